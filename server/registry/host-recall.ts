import type { Logger } from '../../lib/runtime/log.ts'
import { follow } from '../state/follow.ts'
import type { StateStore } from '../state/state-store.ts'
import { VersionConflict } from '../state/state-store.ts'
import type { Caller } from './access.ts'

/** What the state knows of a host. */
export interface HostRecord {
  /** As it enrolled last; a credential goes by its own words. */
  readonly place: string | undefined
  readonly repositories: readonly string[]
  readonly enrolledAt: string
  readonly address: string
  /** Credentials that may still live, oldest first. */
  readonly credentials: readonly { readonly id: string; readonly expiresAt: string }[]
  readonly revoked: boolean
}

/**
 * Writes down again, when it reports, a host whose record was lost with the state: its credential says what the record said. So it is
 * listed, and can be revoked.
 */
export interface HostRecall extends AsyncDisposable {
  heard(caller: Caller, address: string): void
}

const prefix = 'hosts/'
/** Records written at once; who finds no room reports again. */
const writesMax = 20

export function createHostRecall({
  state,
  now,
  log,
}: {
  state: StateStore
  now: () => number
  log: Logger
}): HostRecall {
  const stop = new AbortController()
  let following: Promise<AsyncDisposable> | undefined
  /** Undefined until all have been read, which takes seconds where there are many: no start waits for it. */
  let known: Set<string> | undefined
  let writes = 0

  const followHosts = async () =>
    follow({
      state,
      prefix,
      loaded: async (entries) => {
        const names = new Set<string>()
        for await (const { key } of entries) {
          stop.signal.throwIfAborted()
          names.add(nameOf(key))
        }
        known = names
      },
      changed: (change) => {
        if (change.kind === 'put') known?.add(nameOf(change.entry.key))
        else known?.delete(nameOf(change.key))
      },
      log,
    })

  const write = async (caller: Caller, address: string) => {
    const { name, place, scopes, credential } = caller
    const at = new Date(now()).toISOString()
    const record: HostRecord = {
      place,
      repositories: scopes.map((scope) => scope.slice('pull:'.length)),
      enrolledAt: at,
      address,
      credentials: credential ? [{ id: credential.id, expiresAt: credential.expiresAt.toISOString() }] : [],
      revoked: false,
    }
    try {
      await state.put(`${prefix}${name}`, record, { ifVersion: 0 })
      log.warn({ host: name }, 'a host that the state had lost is known again')
    } catch (error) {
      // It enrolled with another server.
      if (error instanceof VersionConflict) return
      known?.delete(name)
    }
  }
  return {
    heard: (caller, address) => {
      if (!following) {
        following = followHosts()
        following.catch(() => {
          following = undefined
        })
      }
      if (!known || known.has(caller.name) || writes >= writesMax) return
      known.add(caller.name)
      writes++
      void write(caller, address).finally(() => writes--)
    },
    [Symbol.asyncDispose]: async () => {
      stop.abort()
      const followed = await following?.catch(() => undefined)
      await followed?.[Symbol.asyncDispose]()
    },
  }
}

function nameOf(key: string): string {
  return key.slice(prefix.length)
}

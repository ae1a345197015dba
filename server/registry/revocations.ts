import type { Logger } from '../../lib/runtime/log.ts'
import { follow } from '../state/follow.ts'
import type { StateEntry, StateStore } from '../state/state-store.ts'

/** Tokens that no longer count, by `jti`: in memory for the verifier, in the state for the next start. */
export interface Revocations extends AsyncDisposable {
  isRevoked(id: string): boolean
  /** Takes effect at once, and is durable when it returns. */
  revoke(id: string, expiresAt: Date): Promise<void>
}

const prefix = 'deny/'
const sweepMs = 60 * 60 * 1000

/** Loads the deny list, and follows what others write to it. Entries go when the token would have expired. */
export async function loadRevocations({
  state,
  clockToleranceMs,
  now,
  log,
}: {
  state: StateStore
  /** Tokens are accepted for so long after they expired. */
  clockToleranceMs: number
  now: () => number
  log: Logger
}): Promise<Revocations> {
  const denied = new Map<string, number>()
  const add = ({ key, value }: StateEntry) =>
    denied.set(key.slice(prefix.length), (value as { expiresAtMs: number }).expiresAtMs)
  const following = await follow({
    state,
    prefix,
    loaded: async (entries) => {
      for await (const entry of entries) add(entry)
    },
    // Entries go by themselves.
    changed: (change) => {
      if (change.kind === 'put') add(change.entry)
    },
    log,
  })
  const sweeper = setInterval(() => {
    for (const [id, expiresAtMs] of denied) {
      if (expiresAtMs + clockToleranceMs >= now()) continue
      denied.delete(id)
      state.delete(`${prefix}${id}`).catch((error: unknown) => {
        log.warn({ err: error }, 'an expired entry of the deny list stays')
      })
    }
  }, sweepMs)
  sweeper.unref()
  return {
    isRevoked: (id) => denied.has(id),
    revoke: async (id, expiresAt) => {
      denied.set(id, expiresAt.getTime())
      await state.put(`${prefix}${id}`, { expiresAtMs: expiresAt.getTime() })
    },
    [Symbol.asyncDispose]: async () => {
      clearInterval(sweeper)
      await following[Symbol.asyncDispose]()
    },
  }
}

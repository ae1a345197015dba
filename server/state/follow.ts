import { delay } from '../../lib/runtime/backoff.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { entriesOf } from './entries.ts'
import type { StateChange, StateEntry, StateStore } from './state-store.ts'

export interface FollowOptions {
  readonly state: StateStore
  readonly prefix: string
  /** All there is, at the start, and again where changes were missed. */
  readonly loaded: (entries: AsyncIterable<StateEntry>) => Promise<void>
  readonly changed: (change: StateChange) => void
  readonly log: Logger
}

const againMs = 1000

/** Loads what lies under a prefix, and follows what this server and others write to it, until it is disposed. */
export async function follow(options: FollowOptions): Promise<AsyncDisposable> {
  const { state, prefix, loaded, changed, log } = options
  const stop = new AbortController()
  const load = async () => {
    // Watched before it is read: what is written meanwhile comes twice rather than never.
    const watching = new AbortController()
    const changes = state.watch(prefix, AbortSignal.any([stop.signal, watching.signal]))
    try {
      await loaded(entriesOf(state, prefix))
    } catch (error) {
      watching.abort()
      throw error
    }
    return changes
  }
  const first = await load()
  const following = (async () => {
    for (let changes: AsyncIterable<StateChange> | undefined = first; !stop.signal.aborted;) {
      try {
        changes ??= await load()
        for await (const change of changes) changed(change)
      } catch (error) {
        log.warn({ err: error, prefix }, 'the state is not followed: reading it again')
        await delay(againMs, stop.signal).catch(() => undefined)
      }
      changes = undefined
    }
  })()
  return {
    [Symbol.asyncDispose]: async () => {
      stop.abort()
      await following
    },
  }
}

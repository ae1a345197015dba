import type { StateChange } from './state-store.ts'

/** Who watches a state, and what each has yet to read. */
export interface Watchers {
  readonly tell: (change: StateChange) => void
  /** Registers at the call, not at the first `next`, so that no change in between is missed. */
  readonly watch: (prefix: string, signal: AbortSignal) => AsyncIterable<StateChange>
}

/** Changes a slow watcher may fall behind by. */
const backlogMax = 10_000

export function createWatchers(): Watchers {
  const watchers = new Set<(change: StateChange) => void>()
  return {
    tell: (change) => {
      for (const watcher of watchers) watcher(change)
    },
    watch: (prefix, signal) => watch(watchers, prefix, signal),
  }
}

function watch(
  watchers: Set<(change: StateChange) => void>,
  prefix: string,
  signal: AbortSignal,
): AsyncIterable<StateChange> {
  const backlog: StateChange[] = []
  let wake: (() => void) | undefined
  let lost = false
  const watcher = (change: StateChange) => {
    if (!(change.kind === 'put' ? change.entry.key : change.key).startsWith(prefix)) return
    if (backlog.length >= backlogMax) lost = true
    else backlog.push(change)
    wake?.()
  }
  watchers.add(watcher)
  signal.addEventListener('abort', () => wake?.())
  return {
    async *[Symbol.asyncIterator]() {
      try {
        while (!signal.aborted) {
          const change = backlog.shift()
          if (change) yield change
          else if (lost)
            throw new Error(`Cannot watch ${prefix}: the reader fell ${backlogMax} changes behind`)
          else await new Promise<void>((resolve) => (wake = resolve))
        }
      } finally {
        watchers.delete(watcher)
      }
    },
  }
}

import type { Logger } from '../../lib/runtime/log.ts'
import type { AnnounceRecord, PostHook } from './hooks.ts'

/** Records that wait for post-hooks at most; further ones are dropped and counted. */
export const postHookQueueMax = 10_000

/** Announces on their way to the post-hooks. Disposing it waits for those that are in it, a while. */
export interface PostHookQueue extends AsyncDisposable {
  add(record: AnnounceRecord): void
  readonly waiting: number
  readonly dropped: number
}

/** How long the end of the program waits for the hooks to take what is queued. */
const drainMs = 5000

export function createPostHookQueue(hooks: readonly PostHook[], log: Logger): PostHookQueue {
  const queue: AnnounceRecord[] = []
  let dropped = 0
  let running: Promise<void> | undefined

  const run = async () => {
    // The replies of this turn of the loop go out first.
    await new Promise((resolve) => setImmediate(resolve))
    for (let record = queue.shift(); record; record = queue.shift()) {
      for (const hook of hooks) {
        try {
          await hook.announced?.(record)
        } catch (error) {
          log.error({ err: error, hook: hook.name }, 'post-hook failed')
        }
      }
    }
    running = undefined
  }

  return {
    add: (record) => {
      if (queue.length >= postHookQueueMax) {
        dropped++
        return
      }
      queue.push(record)
      running ??= run()
    },
    get waiting() {
      return queue.length
    },
    get dropped() {
      return dropped
    },
    [Symbol.asyncDispose]: async () => {
      const late = Promise.withResolvers<undefined>()
      const timer = setTimeout(late.resolve, drainMs, undefined)
      await Promise.race([running, late.promise])
      clearTimeout(timer)
      if (queue.length > 0) log.warn({ dropped: queue.length }, 'post-hooks were too slow to end in order')
      await Promise.all(hooks.map(async (hook) => hook[Symbol.asyncDispose]?.()))
    },
  }
}

import { createHash } from 'node:crypto'
import { once } from 'node:events'
import type { Digest } from '../../../lib/protocol/digest.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import { follow } from '../../state/follow.ts'
import type { OnOneServer } from '../../state/on-one-server.ts'
import type { StateStore } from '../../state/state-store.ts'
import { VersionConflict } from '../../state/state-store.ts'
import { ApiError } from '../api-error.ts'
import { firstWaitsMs, keepTrying } from './keep-trying.ts'
import type { PullThrough } from './pull-through.ts'
import type { PushEvent } from './push-events.ts'
import { createSlots } from './slots.ts'

export interface EventQueueDeps {
  readonly state: StateStore
  readonly pullThrough: Pick<PullThrough, 'pull'>
  readonly now: () => number
  readonly random: () => number
  readonly log: Logger
  readonly observer: EventObserver
  readonly onOneServer: OnOneServer
}

export interface EventObserver {
  event(outcome: 'accepted' | 'duplicate' | 'ignored' | 'done' | 'gave_up'): void
}

/**
 * Pushes to other registries that are yet to be pulled. What `add` has taken is pulled, whatever happens to this process; an event that
 * was taken before is not pulled again. Several servers have one queue, in the state: each takes events, one of them pulls.
 */
export interface EventQueue extends AsyncDisposable {
  /** Events that are not pulled yet; bounded. */
  readonly waiting: number
  /** Resolves once all of them are stored. @throws ApiError 503 when there is no room; then none of those new is taken */
  add(events: readonly PushEvent[]): Promise<{ accepted: number; duplicates: number }>
}

const waitingMax = 10_000
/** Events remembered after they were pulled, so that one that comes again is known. */
const rememberedMax = 20_000
const pullsMax = 4
const prefix = 'upstream-events/'

interface StoredEvent extends PushEvent {
  readonly receivedAtMs: number
  readonly state: 'waiting' | 'done' | 'gave_up'
}

/** Goes on with what was taken before, by whatever server. */
export async function startEventQueue(deps: EventQueueDeps): Promise<EventQueue> {
  const { state, pullThrough, now, log, observer } = deps
  const ended = new AbortController()
  const slots = createSlots('pulls of events', { max: pullsMax, waitingMax })
  /** In the order in which they came or were settled, so that the first settled one is the oldest. */
  const entries = new Map<string, StoredEvent>()
  /** Events on their way into the state. */
  const saving = new Map<string, Promise<boolean>>()
  const running = new Map<string, Promise<void>>()
  let waiting = 0
  /** Of the time in which this server is the one that pulls. */
  let leading: AbortSignal | undefined

  const set = (key: string, stored: StoredEvent | undefined) => {
    const before = entries.get(key)
    if (before && before.state === stored?.state && before.receivedAtMs === stored.receivedAtMs) return
    if (before?.state === 'waiting') waiting--
    if (stored?.state === 'waiting') waiting++
    entries.delete(key)
    if (stored) entries.set(key, stored)
    if (stored?.state === 'waiting' && leading) begin(key, stored, leading)
  }

  const pull = async (
    { repository, tag, digest, receivedAtMs }: StoredEvent,
    signal: AbortSignal,
  ): Promise<Digest> =>
    keepTrying(
      (tries) =>
        slots.run(() =>
          pullThrough.pull({
            repository,
            reference: tag ?? digest,
            // A manifest that is not seen yet will be; after a while the tag has moved on, and what it is now counts.
            expected: tries <= firstWaitsMs.length ? digest : undefined,
            signal,
          }),
        ),
      { sinceMs: receivedAtMs, patient: true, signal },
      deps,
    )

  const settle = async (key: string, stored: StoredEvent, outcome: 'done' | 'gave_up') => {
    const settled: StoredEvent = { ...stored, state: outcome }
    set(key, settled)
    observer.event(outcome)
    await state.put(`${prefix}${key}`, settled)
    await forgetOldest()
  }
  const forgetOldest = async () => {
    if (entries.size - waiting <= rememberedMax) return
    for (const [key, stored] of entries) {
      if (stored.state === 'waiting') continue
      set(key, undefined)
      await state.delete(`${prefix}${key}`)
      return
    }
  }

  const run = async (key: string, stored: StoredEvent, signal: AbortSignal): Promise<void> => {
    const { id, repository, tag, digest } = stored
    const told = { event: id, repository, tag, digest }
    try {
      const pulled = await pull(stored, signal)
      log.info({ ...told, pulled, tookMs: Math.round(now() - stored.receivedAtMs) }, 'push pulled')
      await settle(key, stored, 'done')
    } catch (error) {
      // It waits in the state for the next start, or for the next server.
      if (signal.aborted) return
      log.error({ ...told, err: error }, 'push was not pulled; giving up')
      await settle(key, stored, 'gave_up')
    }
  }
  const begin = (key: string, stored: StoredEvent, signal: AbortSignal) => {
    if (running.has(key)) return
    const mine = run(key, stored, signal)
      .catch((error: unknown) => {
        if (!signal.aborted) log.error({ err: error }, 'an event was not marked as settled')
      })
      .finally(() => running.delete(key))
    running.set(key, mine)
  }

  const following = await follow({
    state,
    prefix,
    loaded: async (loaded) => {
      const found = (await Array.fromAsync(loaded))
        .map(({ key, value }) => ({ key: key.slice(prefix.length), stored: value as StoredEvent }))
        .sort((a, b) => a.stored.receivedAtMs - b.stored.receivedAtMs)
      const keys = new Set(found.map(({ key }) => key))
      for (const key of [...entries.keys()]) if (!keys.has(key) && !saving.has(key)) set(key, undefined)
      for (const { key, stored } of found) set(key, stored)
    },
    changed: (change) => {
      if (change.kind === 'put') set(change.entry.key.slice(prefix.length), change.entry.value as StoredEvent)
      else set(change.key.slice(prefix.length), undefined)
    },
    log,
  })
  const led = deps.onOneServer('upstream-events', ended.signal, async (signal) => {
    leading = signal
    try {
      for (const [key, stored] of entries) if (stored.state === 'waiting') begin(key, stored, signal)
      await untilEnded(signal)
    } finally {
      leading = undefined
      await Promise.all(running.values())
    }
  })

  /** Whether it is to be pulled; not where another server, or this one, has it already. */
  const save = async (key: string, stored: StoredEvent): Promise<boolean> => {
    for (;;) {
      const there = await state.get(`${prefix}${key}`)
      if (there && isKnown(there.value as StoredEvent)) return false
      try {
        await state.put(`${prefix}${key}`, stored, { ifVersion: there?.version ?? 0 })
        return true
      } catch (error) {
        if (!(error instanceof VersionConflict)) throw error
      }
    }
  }

  return {
    get waiting() {
      return waiting
    },
    add: async (events) => {
      const fresh = new Map<string, PushEvent>()
      const known: Promise<boolean>[] = []
      for (const event of events) {
        const key = keyOf(event)
        const stored = entries.get(key)
        const underWay = saving.get(key)
        if (underWay) known.push(underWay)
        else if (!stored || !isKnown(stored)) fresh.set(key, event)
      }
      if (waiting + saving.size + fresh.size > waitingMax)
        throw new ApiError(503, 'TOOMANYREQUESTS', `Cannot take the events: ${waiting} wait already`, {
          hint: 'The upstream may be down: the log says what they wait for.',
          headers: { 'retry-after': '10' },
        })
      const receivedAtMs = now()
      // All of them are known before the first wait: whoever sends one again meanwhile waits for the same write.
      const added = [...fresh].map(([key, event]) => {
        const stored: StoredEvent = { ...event, receivedAtMs, state: 'waiting' }
        const saved = save(key, stored)
          .then((isNew) => {
            if (isNew) set(key, stored)
            return isNew
          })
          .finally(() => saving.delete(key))
        saving.set(key, saved)
        return saved
      })
      const results = await Promise.allSettled(added)
      for (const result of results) if (result.status === 'rejected') throw result.reason
      await Promise.all(known)
      const accepted = results.filter((result) => result.status === 'fulfilled' && result.value).length
      for (let i = 0; i < events.length; i++) observer.event(i < accepted ? 'accepted' : 'duplicate')
      return { accepted, duplicates: events.length - accepted }
    },
    [Symbol.asyncDispose]: async () => {
      ended.abort(new Error('the server is ending'))
      await led
      await following[Symbol.asyncDispose]()
    },
  }
}

/** One that was given up may be sent again; so may one without an id, which says nothing about when it was. */
function isKnown({ state, id }: StoredEvent): boolean {
  return state === 'waiting' || (state === 'done' && id !== '')
}

async function untilEnded(signal: AbortSignal): Promise<void> {
  if (!signal.aborted) await once(signal, 'abort')
}

/** The same event, sent again, has the same key. */
function keyOf({ id, repository, tag, digest }: PushEvent): string {
  return createHash('sha256')
    .update(JSON.stringify([id, repository, tag, digest]))
    .digest('hex')
}

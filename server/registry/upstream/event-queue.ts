import { createHash } from 'node:crypto'
import type { Digest } from '../../../lib/protocol/digest.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { StateStore } from '../../state/state-store.ts'
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
}

export interface EventObserver {
  event(outcome: 'accepted' | 'duplicate' | 'ignored' | 'done' | 'gave_up'): void
}

/**
 * Pushes to other registries that are yet to be pulled. What `add` has taken is pulled, whatever happens to this process; an event that
 * was taken before is not pulled again.
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
const pageSize = 1000

interface StoredEvent extends PushEvent {
  readonly receivedAtMs: number
  readonly state: 'waiting' | 'done' | 'gave_up'
}

interface Entry {
  stored: StoredEvent
  /** Resolves once it is in the state. */
  saved: Promise<unknown>
}

/** Goes on with what the last process had taken. */
export async function startEventQueue(deps: EventQueueDeps): Promise<EventQueue> {
  const { state, pullThrough, now, log, observer } = deps
  const ended = new AbortController()
  const slots = createSlots('pulls of events', { max: pullsMax, waitingMax })
  /** In the order in which they came or were settled, so that the first settled one is the oldest. */
  const entries = new Map<string, Entry>()
  const running = new Set<Promise<void>>()
  let waiting = 0

  const save = (key: string, stored: StoredEvent) => state.put(`${prefix}${key}`, stored)

  const pull = async ({ repository, tag, digest, receivedAtMs }: StoredEvent): Promise<Digest> =>
    keepTrying(
      (tries) =>
        slots.run(() =>
          pullThrough.pull({
            repository,
            reference: tag ?? digest,
            // A manifest that is not seen yet will be; after a while the tag has moved on, and what it is now counts.
            expected: tries <= firstWaitsMs.length ? digest : undefined,
            signal: ended.signal,
          }),
        ),
      { sinceMs: receivedAtMs, patient: true, signal: ended.signal },
      deps,
    )

  const settle = async (key: string, entry: Entry, outcome: 'done' | 'gave_up') => {
    entry.stored = { ...entry.stored, state: outcome }
    waiting--
    entries.delete(key)
    entries.set(key, entry)
    observer.event(outcome)
    await save(key, entry.stored)
    await forgetOldest()
  }
  const forgetOldest = async () => {
    if (entries.size - waiting <= rememberedMax) return
    for (const [key, { stored }] of entries) {
      if (stored.state === 'waiting') continue
      entries.delete(key)
      await state.delete(`${prefix}${key}`)
      return
    }
  }

  const run = async (key: string, entry: Entry): Promise<void> => {
    const { id, repository, tag, digest } = entry.stored
    const told = { event: id, repository, tag, digest }
    try {
      const pulled = await pull(entry.stored)
      log.info({ ...told, pulled, tookMs: Math.round(now() - entry.stored.receivedAtMs) }, 'push pulled')
      await settle(key, entry, 'done')
    } catch (error) {
      // It waits in the state for the next start.
      if (ended.signal.aborted) return
      log.error({ ...told, err: error }, 'push was not pulled; giving up')
      await settle(key, entry, 'gave_up')
    }
  }
  const begin = (key: string, entry: Entry) => {
    const mine = run(key, entry)
      .catch((error: unknown) => {
        if (!ended.signal.aborted) log.error({ err: error }, 'an event was not marked as settled')
      })
      .finally(() => running.delete(mine))
    running.add(mine)
  }

  const loaded = (await listAll(state)).sort((a, b) => a.stored.receivedAtMs - b.stored.receivedAtMs)
  for (const { key, stored } of loaded) {
    const entry = { stored, saved: Promise.resolve() }
    entries.set(key, entry)
    if (stored.state !== 'waiting') continue
    waiting++
    begin(key, entry)
  }

  return {
    get waiting() {
      return waiting
    },
    add: async (events) => {
      const fresh = new Map<string, PushEvent>()
      const known: Entry[] = []
      for (const event of events) {
        const key = keyOf(event)
        const entry = entries.get(key)
        // One that was given up may be sent again; so may one without an id, which says nothing about when it was.
        if (entry && (entry.stored.state === 'waiting' || (entry.stored.state === 'done' && event.id !== '')))
          known.push(entry)
        else fresh.set(key, event)
      }
      if (waiting + fresh.size > waitingMax)
        throw new ApiError(503, 'TOOMANYREQUESTS', `Cannot take the events: ${waiting} wait already`, {
          hint: 'The upstream may be down: the log says what they wait for.',
          headers: { 'retry-after': '10' },
        })
      const receivedAtMs = now()
      // All of them are known before the first wait: whoever sends one again meanwhile waits for the same write.
      const added = [...fresh].map(([key, event]) => {
        const stored: StoredEvent = { ...event, receivedAtMs, state: 'waiting' }
        const entry: Entry = { stored, saved: save(key, stored) }
        entries.delete(key)
        entries.set(key, entry)
        waiting++
        return { key, entry }
      })
      const results = await Promise.allSettled(
        added.map(async ({ key, entry }) => {
          try {
            await entry.saved
          } catch (error) {
            entries.delete(key)
            waiting--
            throw error
          }
          observer.event('accepted')
          begin(key, entry)
        }),
      )
      for (const result of results) if (result.status === 'rejected') throw result.reason
      await Promise.all(known.map(({ saved }) => saved))
      for (let i = added.length; i < events.length; i++) observer.event('duplicate')
      return { accepted: added.length, duplicates: events.length - added.length }
    },
    [Symbol.asyncDispose]: async () => {
      ended.abort(new Error('the server is ending'))
      await Promise.all(running)
    },
  }
}

/** The same event, sent again, has the same key. */
function keyOf({ id, repository, tag, digest }: PushEvent): string {
  return createHash('sha256')
    .update(JSON.stringify([id, repository, tag, digest]))
    .digest('hex')
}

async function listAll(state: StateStore): Promise<{ key: string; stored: StoredEvent }[]> {
  const all: { key: string; stored: StoredEvent }[] = []
  for (let after = ''; ;) {
    const page = await state.list(prefix, { after, limit: pageSize })
    for (const { key, value } of page)
      all.push({ key: key.slice(prefix.length), stored: value as StoredEvent })
    const last = page.at(-1)
    if (page.length < pageSize || !last) return all
    after = last.key
  }
}

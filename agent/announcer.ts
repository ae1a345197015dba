import type { Dispatcher } from 'undici'
import { request } from 'undici'
import type { AnnounceEvent, ParsedAnnounceReply } from '../lib/protocol/announce.ts'
import { parseAnnounceReply, writeAnnounce } from '../lib/protocol/announce.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import type { InfoHash } from '../lib/protocol/infohash.ts'
import { backoff } from '../lib/runtime/backoff.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { EnginePeer } from './engine/engine.ts'
import { PeerStream } from './peer-stream.ts'

/** What the right to announce consists of. */
export interface AnnounceGrant {
  readonly announceUrl: string
  readonly token: string
  /** Epoch milliseconds. */
  readonly obtainedAt: number
  readonly expiresAt: number
}

export interface AnnounceOptions {
  readonly infoHash: InfoHash
  /** Undefined: `renew` is called before the first announce. */
  readonly grant: AnnounceGrant | undefined
  renew(signal: AbortSignal): Promise<AnnounceGrant>
  progress(): { readonly left: number; readonly downloaded: number; readonly uploaded: number }
  /** Waits a random part of this before the first announce. */
  readonly spreadMs?: number
}

/** One torrent's place in the swarm. */
export interface Announcement {
  readonly peers: AsyncIterable<EnginePeer>
  /** Soon, within what the tracker allows: nothing moves. */
  announceNow(): void
  completed(): void
  setGrant(grant: AnnounceGrant): void
  /** Hosts that have everything, this one included, as the tracker last said. */
  readonly seeds: number | undefined
  /** Why the last announce failed, in words without secrets. */
  readonly lastError: string | undefined
  /** Leaves the swarm: `stopped` is sent, with a short deadline. */
  close(): Promise<void>
}

export type AnnounceOutcome = 'ok' | 'refused' | 'failed' | 'no_grant'

export interface AnnouncerDeps {
  peerId: Uint8Array
  port: number
  dispatcher: Dispatcher
  /** Milliseconds since 1970, for tokens; it may be set back. */
  now: () => number
  /** Milliseconds since some start, for everything that is due; it never goes back. */
  monotonic: () => number
  random: () => number
  log: Logger
  observe?: { announced(outcome: AnnounceOutcome): void }
}

/** Announces for every torrent of the agent, through one queue. */
export interface Announcer extends AsyncDisposable {
  add(options: AnnounceOptions): Announcement
  /** The tracker's epoch, from a report: a new one means that it forgot us. */
  noteEpoch(epoch: string): void
}

/** Announces under way at once: a host that starts with 500 blobs must not open 500 connections. */
const announcesMax = 8
const announceTimeoutMs = 10_000
/** `stopped` is a courtesy: peers of ours that are gone cost others a failed dial, no more. */
const stoppedTimeoutMs = 2000
const replyMaxBytes = 1024 * 1024
/** All that is held is announced again within this long after the tracker's epoch changed. */
const epochSpreadMs = 8000
/** Between announces that were asked for, however impatient a fetch is. */
const askedAgainMs = 5000
const renewalPauseMs = 15_000
const fetchRetryMaxMs = 4000
const seedRetryMaxMs = 60_000

interface Entry extends AnnounceOptions {
  readonly stream: PeerStream
  currentGrant: AnnounceGrant | undefined
  event: AnnounceEvent | undefined
  thenCompleted: boolean
  dueAt: number
  announcedAt: number
  refusedAt: number
  minIntervalMs: number
  trackerId: string | undefined
  seeds: number | undefined
  waits: Generator<number, never>
  lastError: string | undefined
  /** An announce was sent; whether it arrived is another matter. */
  mayBeKnown: boolean
  busy: Promise<void> | undefined
  readonly gone: AbortController
}

export function createAnnouncer(deps: AnnouncerDeps): Announcer {
  const { now, monotonic, random, log } = deps
  const entries = new Set<Entry>()
  let underWay = 0
  let timer: NodeJS.Timeout | undefined
  /** What each has said last: where registry and tracker are two servers, they have an epoch each. */
  const epochs: { report?: string; announce?: string } = {}
  let closed = false

  /** A fetch must go on soon after an outage; what is only seeded may take its time, and there is much of it. */
  const newWaits = (entry: Pick<Entry, 'progress'>) =>
    backoff({ firstMs: 1000, maxMs: entry.progress().left > 0 ? fetchRetryMaxMs : seedRetryMaxMs, random })

  /** Starts what is due, and sleeps until the next is. */
  const pump = () => {
    clearTimeout(timer)
    if (closed) return
    const due = [...entries].filter((entry) => entry.busy === undefined).toSorted((a, b) => a.dueAt - b.dueAt)
    for (const entry of due) {
      if (underWay >= announcesMax) return
      const waitMs = entry.dueAt - monotonic()
      if (waitMs > 0) {
        timer = setTimeout(pump, Math.min(waitMs, 2 ** 31 - 1))
        return
      }
      underWay++
      entry.busy = turn(entry).finally(() => {
        underWay--
        entry.busy = undefined
        pump()
      })
    }
  }

  const turn = async (entry: Entry): Promise<void> => {
    try {
      const grant = await freshGrant(entry)
      const { event } = entry
      entry.mayBeKnown = true
      const reply = await announce(
        entry,
        grant,
        event,
        AbortSignal.any([entry.gone.signal, AbortSignal.timeout(announceTimeoutMs)]),
      )
      deps.observe?.announced('ok')
      // An event that came up meanwhile is still to be told.
      if (entry.event === event) entry.event = undefined
      if (entry.thenCompleted && entry.event === undefined) {
        entry.thenCompleted = false
        entry.event = 'completed'
      }
      entry.lastError = undefined
      entry.waits = newWaits(entry)
      entry.announcedAt = monotonic()
      entry.trackerId = reply.trackerId ?? entry.trackerId
      entry.minIntervalMs = reply.minIntervalSeconds * 1000
      entry.dueAt =
        entry.event === undefined
          ? monotonic() + Math.max(1000, reply.intervalSeconds * 1000 * (0.9 + random() / 10))
          : monotonic()
      entry.seeds = reply.complete
      entry.stream.push(toEnginePeers(reply))
      if (reply.rackswarm) noteEpoch('announce', reply.rackswarm.epoch, entry)
    } catch (error) {
      if (entry.gone.signal.aborted) return
      afterFailure(entry, error)
    }
  }

  const freshGrant = async (entry: Entry): Promise<AnnounceGrant> => {
    const held = entry.currentGrant
    if (held && held.expiresAt - now() >= (held.expiresAt - held.obtainedAt) / 3) return held
    try {
      entry.currentGrant = await entry.renew(
        AbortSignal.any([entry.gone.signal, AbortSignal.timeout(announceTimeoutMs)]),
      )
      return entry.currentGrant
    } catch (error) {
      // While the old one counts, the registry may be down without the swarm noticing.
      if (held && held.expiresAt > now()) return held
      throw new NoGrantError(error)
    }
  }

  const afterFailure = (entry: Entry, error: unknown) => {
    const refused = error instanceof ClientError && error.code === 'tracker_failure'
    deps.observe?.announced(error instanceof NoGrantError ? 'no_grant' : refused ? 'refused' : 'failed')
    entry.lastError = describe(error)
    entry.dueAt = monotonic() + entry.waits.next().value
    if (
      refused &&
      /invalid jwt|missing jwt/.test(error.message) &&
      monotonic() - entry.refusedAt > renewalPauseMs
    ) {
      // Keys may have changed under a token that is good by its dates.
      entry.refusedAt = monotonic()
      entry.currentGrant = undefined
      entry.dueAt = monotonic()
    }
    log.debug({ infohash: entry.infoHash, error: entry.lastError }, 'announce failed')
  }

  const announce = async (
    entry: Entry,
    grant: AnnounceGrant,
    event: AnnounceEvent | undefined,
    signal: AbortSignal,
  ): Promise<ParsedAnnounceReply> => {
    const progress = entry.progress()
    const query = writeAnnounce({
      infoHash: entry.infoHash,
      peerId: deps.peerId,
      port: deps.port,
      ...progress,
      event,
      numwant: progress.left === 0 || event === 'stopped' ? 0 : undefined,
      trackerId: entry.trackerId,
      jwt: grant.token,
      rackswarm: true,
    })
    const separator = grant.announceUrl.includes('?') ? '&' : '?'
    const response = await request(`${grant.announceUrl}${separator}${query}`, {
      dispatcher: deps.dispatcher,
      signal,
    })
    const parts: Buffer[] = []
    let size = 0
    for await (const part of response.body as AsyncIterable<Buffer>) {
      size += part.length
      if (size > replyMaxBytes)
        throw new ClientError('bad_reply', `Cannot read tracker reply: more than ${replyMaxBytes} bytes`)
      parts.push(part)
    }
    const bytes = Buffer.concat(parts)
    if (response.statusCode !== 200 && bytes[0] !== 0x64)
      throw new ClientError('bad_reply', `the tracker answered with status ${response.statusCode}`)
    return parseAnnounceReply(bytes)
  }

  const noteEpoch = (source: keyof typeof epochs, seen: string, from?: Entry) => {
    const before = epochs[source] ?? epochs.announce ?? epochs.report
    const heard = Object.values(epochs).includes(seen)
    epochs[source] = seen
    if (before === undefined || heard) return
    log.info({ torrents: entries.size }, 'the tracker started anew: announcing all that is held')
    for (const entry of entries) {
      if (entry === from) continue
      entry.event = 'started'
      entry.dueAt = Math.min(entry.dueAt, monotonic() + random() * epochSpreadMs)
    }
    pump()
  }

  const leave = async (entry: Entry): Promise<void> => {
    entries.delete(entry)
    entry.gone.abort(new Error('the torrent was closed'))
    entry.stream.end()
    await entry.busy
    if (!entry.mayBeKnown || !entry.currentGrant || entry.currentGrant.expiresAt < now()) return
    await announce(entry, entry.currentGrant, 'stopped', AbortSignal.timeout(stoppedTimeoutMs)).catch(
      (error: unknown) => {
        log.debug({ infohash: entry.infoHash, error: describe(error) }, 'stopped was not told')
      },
    )
  }

  return {
    add: (options) => {
      const entry: Entry = {
        ...options,
        stream: new PeerStream(),
        currentGrant: options.grant,
        event: 'started',
        thenCompleted: false,
        dueAt: monotonic() + random() * (options.spreadMs ?? 0),
        announcedAt: -Infinity,
        refusedAt: -Infinity,
        minIntervalMs: 0,
        trackerId: undefined,
        seeds: undefined,
        waits: newWaits(options),
        lastError: undefined,
        mayBeKnown: false,
        busy: undefined,
        gone: new AbortController(),
      }
      entries.add(entry)
      pump()
      return {
        peers: entry.stream,
        announceNow: () => {
          const soonest = entry.announcedAt + Math.min(entry.minIntervalMs, askedAgainMs)
          entry.dueAt = Math.min(entry.dueAt, Math.max(monotonic(), soonest))
          pump()
        },
        completed: () => {
          // `started` goes first, if it was not answered yet.
          if (entry.event === 'started') entry.thenCompleted = true
          else entry.event = 'completed'
          entry.dueAt = monotonic()
          pump()
        },
        setGrant: (grant) => {
          entry.currentGrant = grant
        },
        get seeds() {
          return entry.seeds
        },
        get lastError() {
          return entry.lastError
        },
        close: () => leave(entry),
      }
    },
    noteEpoch: (seen) => {
      noteEpoch('report', seen)
    },
    [Symbol.asyncDispose]: async () => {
      closed = true
      clearTimeout(timer)
      const deadline = Promise.withResolvers<undefined>()
      const cut = setTimeout(() => {
        deadline.resolve(undefined)
      }, 2 * stoppedTimeoutMs)
      await Promise.race([Promise.all([...entries].map(leave)), deadline.promise])
      clearTimeout(cut)
    },
  }
}

/** Far peers wait while the own rack has any, unless this host is a gateway of its rack. */
export function toEnginePeers(reply: ParsedAnnounceReply): EnginePeer[] {
  const nearExist = reply.peers.some(({ distance }) => distance === 0)
  const gateway = reply.rackswarm?.gateway === true
  return reply.peers.map(({ endpoint, distance }) => ({
    endpoint,
    distance,
    reserve: distance > 0 && nearExist && !gateway,
  }))
}

class NoGrantError extends Error {
  override readonly name = 'NoGrantError'

  constructor(cause: unknown) {
    super(`Cannot renew the announce token: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    })
  }
}

/** Errors of the HTTP library may quote the URL, which holds a token. */
function describe(error: unknown): string {
  if (error instanceof ClientError) return `the tracker says: ${error.message}`.slice(0, 300)
  if (error instanceof NoGrantError) return error.message.slice(0, 300)
  const code =
    error instanceof Error && 'code' in error ? String(error.code) : error instanceof Error ? error.name : ''
  return `the tracker cannot be reached (${code})`
}

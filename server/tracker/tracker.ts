import type { Ip } from '../../lib/protocol/address.ts'
import { endpoint, isUnspecified, parseIp } from '../../lib/protocol/address.ts'
import type { Announce } from '../../lib/protocol/announce.ts'
import { parseAnnounce, writeAnnounceReply, writeFailure } from '../../lib/protocol/announce.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import { cidrContains } from '../../lib/protocol/cidr.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { Scrape, SwarmCounts } from '../../lib/protocol/scrape.ts'
import { parseScrape, writeScrapeReply } from '../../lib/protocol/scrape.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { AnnounceRequest, PreHook, ScrapeRequest } from './hooks.ts'
import type { IntervalConfig } from './intervals.ts'
import { announceIntervalMs, lifetimeMs } from './intervals.ts'
import type { PeerStore, StoreTotals, SwarmView } from './peer-store.ts'
import { selectPeers } from './selection.ts'
import type { Topology } from './topology.ts'

/** How a request ended: labels of a metric. */
export type TrackerOutcome = 'ok' | 'refused' | 'error'

/** Told of each request; implemented by the program's metrics. */
export interface TrackerObserver {
  handled(action: 'announce' | 'scrape', family: 4 | 6, outcome: TrackerOutcome, seconds: number): void
}

export interface TrackerConfig extends IntervalConfig {
  readonly numwantDefault: number
  readonly numwantMax: number
  readonly scrapeMax: number
  readonly gatewaysPerRack: number
  readonly reservePeers: number
  /** Networks whose `ip=`, `ipv4=` and `ipv6=` count. */
  readonly trustedAnnouncers: readonly Cidr[]
}

export interface TrackerDeps {
  readonly store: PeerStore
  readonly topology: Topology
  readonly hooks: readonly PreHook[]
  readonly config: TrackerConfig
  /** Random for each start: agents that see a new one announce all they hold again. */
  readonly epoch: string
  readonly random: () => number
  readonly now: () => number
  readonly observer: TrackerObserver
  readonly log: Logger
}

/**
 * The tracker without its frontends: a raw query and a source address become reply bytes. Never throws: a peer's
 * fault is a `failure reason` (BEP 3), anything else is logged and answered with "internal server error".
 * Synchronous wherever hooks and store are.
 */
export interface Tracker {
  readonly epoch: string
  announce(rawQuery: string, source: Ip): Buffer | Promise<Buffer>
  scrape(rawQuery: string, source: Ip): Buffer | Promise<Buffer>
  /** Counts of one swarm, for the registry. */
  counts(infoHash: InfoHash): SwarmCounts | Promise<SwarmCounts>
  /** All swarms together. */
  totals(): StoreTotals
}

export function createTracker(deps: TrackerDeps): Tracker {
  const { store, hooks, observer, now } = deps
  const answer = (
    action: 'announce' | 'scrape',
    source: Ip,
    work: () => Buffer | Promise<Buffer>,
  ): Buffer | Promise<Buffer> => {
    const startMs = now()
    const done = (outcome: TrackerOutcome, bytes: Buffer) => {
      observer.handled(action, source.family, outcome, (now() - startMs) / 1000)
      return bytes
    }
    const failed = (error: unknown) => {
      if (error instanceof ClientError) return done('refused', writeFailure(error.message))
      deps.log.error({ err: error, action }, 'request failed')
      return done('error', writeFailure('internal server error'))
    }
    try {
      const bytes = work()
      return bytes instanceof Promise ? bytes.then((late) => done('ok', late), failed) : done('ok', bytes)
    } catch (error) {
      return failed(error)
    }
  }
  return {
    epoch: deps.epoch,
    announce: (rawQuery, source) =>
      answer('announce', source, () => {
        const announce = parseAnnounce(rawQuery)
        const request: AnnounceRequest = {
          announce,
          source: addressOf(announce, source, deps.config),
          place: undefined,
        }
        const waiting = runHooks(hooks, (hook) => hook.announce?.(request))
        return waiting ? waiting.then(() => storeAndReply(request, deps)) : storeAndReply(request, deps)
      }),
    scrape: (rawQuery, source) =>
      answer('scrape', source, () => {
        const scrape = parseScrape(rawQuery)
        if (scrape.infoHashes.length > deps.config.scrapeMax) {
          throw new ClientError(
            'bad_scrape',
            `too many infohashes: at most ${deps.config.scrapeMax} in one scrape`,
          )
        }
        const request: ScrapeRequest = { scrape, source }
        const waiting = runHooks(hooks, (hook) => hook.scrape?.(request))
        return waiting ? waiting.then(async () => scrapeReply(scrape, store)) : scrapeReply(scrape, store)
      }),
    counts: (infoHash) => store.scrape(infoHash),
    totals: () => store.totals(),
  }
}

/** Runs hooks in order; a promise only from the first one that does not answer at once. */
function runHooks(
  hooks: readonly PreHook[],
  run: (hook: PreHook) => void | Promise<void>,
): Promise<void> | undefined {
  for (const [i, hook] of hooks.entries()) {
    const waiting = run(hook)
    if (waiting) {
      return waiting.then(async () => {
        for (const later of hooks.slice(i + 1)) await run(later)
      })
    }
  }
  return undefined
}

/** What a peer says of its address counts only from networks that were configured for it; 0.0.0.0 means the source. */
function addressOf(announce: Announce, source: Ip, { trustedAnnouncers }: TrackerConfig): Ip {
  const claimed = announce.ip ?? announce.ipv4 ?? announce.ipv6
  if (claimed === undefined || !trustedAnnouncers.some((cidr) => cidrContains(cidr, source))) return source
  const ip = parseIp(claimed)
  if (!ip) throw new ClientError('bad_address', 'failed to parse peer IP address')
  return isUnspecified(ip) ? source : ip
}

function storeAndReply(request: AnnounceRequest, deps: TrackerDeps): Buffer | Promise<Buffer> {
  const { announce, source } = request
  const { store, topology, config, random } = deps
  const place = request.place === undefined ? topology.placeOfAddress(source) : topology.idOf(request.place)
  const numwant =
    announce.event === 'stopped' ? 0 : Math.min(announce.numwant ?? config.numwantDefault, config.numwantMax)
  // Chosen once the store knows the counts; the peer is then kept for as long as that interval wants.
  let intervalMs = config.announceIntervalMs
  const view = store.announce({
    infoHash: announce.infoHash,
    endpoint: endpoint(source, announce.port),
    peerId: announce.peerId,
    place,
    left: announce.left,
    event: announce.event,
    lifetimeMs: (counts) => {
      intervalMs = announceIntervalMs({ ...counts, seeding: announce.left === 0 }, config, random)
      return lifetimeMs(intervalMs)
    },
    distanceTo: (other) => topology.distance(place, other),
    perLevelMax: numwant,
  })
  return view instanceof Promise
    ? view.then((late) => reply(request, late, { numwant, intervalMs }, deps))
    : reply(request, view, { numwant, intervalMs }, deps)
}

function reply(
  { announce, source }: AnnounceRequest,
  view: SwarmView,
  { numwant, intervalMs }: { numwant: number; intervalMs: number },
  { config, random, epoch }: TrackerDeps,
): Buffer {
  const { peers, gateway } = selectPeers({ view, seeding: announce.left === 0, numwant, random, ...config })
  return writeAnnounceReply(
    {
      ...view.counts,
      intervalSeconds: Math.max(1, Math.round(intervalMs / 1000)),
      minIntervalSeconds: Math.max(1, Math.round(config.minAnnounceIntervalMs / 1000)),
      peers,
      externalIp: source.bytes,
      trackerId: undefined,
      rackswarm: announce.rackswarm ? { epoch, gateway } : undefined,
    },
    announce.compact,
  )
}

function scrapeReply({ infoHashes }: Scrape, store: PeerStore): Buffer | Promise<Buffer> {
  const files = new Map<InfoHash, SwarmCounts>()
  const late: Promise<void>[] = []
  for (const infoHash of infoHashes) {
    const counts = store.scrape(infoHash)
    if (counts instanceof Promise) late.push(counts.then((known) => void files.set(infoHash, known)))
    else files.set(infoHash, counts)
  }
  return late.length === 0 ? writeScrapeReply(files) : Promise.all(late).then(() => writeScrapeReply(files))
}

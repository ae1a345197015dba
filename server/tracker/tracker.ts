import type { Family, Ip } from '../../lib/protocol/address.ts'
import { endpoint, isUnspecified, parseIp } from '../../lib/protocol/address.ts'
import type { Announce, AnnounceReply } from '../../lib/protocol/announce.ts'
import {
  parseAnnounce,
  writeAnnounceReply,
  writeCompactAnnounceReply,
  writeFailure,
} from '../../lib/protocol/announce.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import { cidrContains } from '../../lib/protocol/cidr.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { Scrape, SwarmCounts } from '../../lib/protocol/scrape.ts'
import { parseScrape, writeScrapeReply } from '../../lib/protocol/scrape.ts'
import {
  parseUdpAnnounce,
  parseUdpScrape,
  readUdpTransactionId,
  udpActions,
  udpReplyMax,
  udpScrapeMax,
  writeUdpAnnounceHeader,
  writeUdpError,
  writeUdpScrapeReply,
} from '../../lib/protocol/udp.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { AnnounceRequest, Frontend, PreHook, ScrapeRequest } from './hooks.ts'
import type { IntervalConfig } from './intervals.ts'
import { announceIntervalMs, lifetimeMs } from './intervals.ts'
import { finish, mix } from './memory/hash-index.ts'
import type { PeerStore, StoreAnnounce, StoreReply, StoreTotals, SwarmView } from './peer-store.ts'
import type { PostHookQueue } from './post-hooks.ts'
import type { Plan } from './selection.ts'
import { planSelection } from './selection.ts'
import type { Ancestor, PlaceId, Topology } from './topology.ts'

export type TrackerAction = 'announce' | 'scrape'

/** How a request ended: labels of a metric. */
export type TrackerOutcome = 'ok' | 'refused' | 'error'

/** Told of each request; implemented by the program's metrics. */
export interface TrackerObserver {
  handled(
    frontend: Frontend,
    action: TrackerAction,
    family: Family,
    outcome: TrackerOutcome,
    seconds: number,
  ): void
  /** Why a request was refused: a ClientError's code. */
  refused(code: string): void
}

export interface TrackerConfig extends IntervalConfig {
  readonly numwantDefault: number
  readonly numwantMax: number
  readonly scrapeMax: number
  readonly gatewaysPerRack: number
  readonly reservePeers: number
  /** Networks whose `ip=`, `ipv4=` and `ipv6=` count. */
  readonly trustedAnnouncers: readonly Cidr[]
  /** Networks that may ask for all swarms at once. */
  readonly fullScrapeNetworks: readonly Cidr[]
}

/** What may be exchanged while the tracker answers. */
export interface TrackerRules {
  readonly topology: Topology
  readonly hooks: readonly PreHook[]
  readonly config: TrackerConfig
}

export interface TrackerDeps {
  readonly store: PeerStore
  readonly rules: TrackerRules
  /** Told of each announce after its reply; undefined where nobody wants to know. */
  readonly after: PostHookQueue | undefined
  /** Random for each start: agents that see a new one announce all they hold again. */
  readonly epoch: string
  /** Milliseconds of a clock that never goes back, with a fraction. */
  readonly now: () => number
  readonly observer: TrackerObserver
  readonly log: Logger
}

/** Gives a buffer of so many bytes. */
export type AllocateReply = (bytes: number) => Buffer

const allocateReply: AllocateReply = (bytes) => Buffer.allocUnsafe(bytes)

/**
 * The tracker without its frontends: a raw query or packet and a source address become reply bytes. Never throws: a peer's
 * fault is a `failure reason` (BEP 3) or an error packet (BEP 15), anything else is logged and answered with "internal server
 * error". Synchronous wherever hooks and store are.
 */
export interface Tracker {
  readonly epoch: string
  announce(rawQuery: string, source: Ip): Buffer | Promise<Buffer>
  scrape(rawQuery: string, source: Ip): Buffer | Promise<Buffer>
  /**
   * An announce or scrape packet whose connection id has been found good. The reply to an announce is written into what `allocate` gives:
   * whatever sends replies may know buffers that are free again.
   */
  packet(
    packet: Buffer,
    action: TrackerAction,
    source: Ip,
    allocate?: AllocateReply,
  ): Buffer | Promise<Buffer>
  /** Counts of one swarm, for the registry. */
  counts(infoHash: InfoHash): SwarmCounts | Promise<SwarmCounts>
  /** All swarms together. */
  totals(): StoreTotals
  /** Exchanges the rules between two requests; those under way end by the old ones. */
  replaceRules(rules: TrackerRules): void
}

export function createTracker(deps: TrackerDeps): Tracker {
  const { store, observer, now } = deps
  let rules = sortHooks(deps.rules)
  let fullScrapes = 0

  /** Answers at once where it can: then an announce costs no promise, and no closure. */
  const answer = (
    kind: RequestKind,
    input: string | Buffer,
    source: Ip,
    allocate: AllocateReply,
  ): Buffer | Promise<Buffer> => {
    const startMs = now()
    let bytes: Buffer | Promise<Buffer>
    try {
      bytes = work(kind, input, source, allocate)
    } catch (error) {
      return failed(kind, input, source, startMs, error)
    }
    if (bytes instanceof Promise)
      return bytes.then(
        (late) => done(kind, source, startMs, 'ok', late),
        (error: unknown) => failed(kind, input, source, startMs, error),
      )
    return done(kind, source, startMs, 'ok', bytes)
  }

  const done = (
    { frontend, action }: RequestKind,
    { family }: Ip,
    startMs: number,
    outcome: TrackerOutcome,
    bytes: Buffer,
  ): Buffer => {
    observer.handled(frontend, action, family, outcome, (now() - startMs) / 1000)
    return bytes
  }

  const failed = (
    kind: RequestKind,
    input: string | Buffer,
    source: Ip,
    startMs: number,
    error: unknown,
  ): Buffer => {
    const write = (message: string, retryInMinutes?: number) =>
      typeof input === 'string'
        ? writeFailure(message, retryInMinutes)
        : writeUdpFailure(input, message, source.family)
    if (error instanceof ClientError) {
      observer.refused(error.code)
      return done(kind, source, startMs, 'refused', write(error.message, error.retryInMinutes))
    }
    deps.log.error({ err: error, action: kind.action }, 'request failed')
    return done(kind, source, startMs, 'error', write('internal server error'))
  }

  const work = (
    kind: RequestKind,
    input: string | Buffer,
    source: Ip,
    allocate: AllocateReply,
  ): Buffer | Promise<Buffer> => {
    if (kind.action === 'announce') {
      const announce =
        typeof input === 'string' ? parseAnnounce(input) : parseUdpAnnounce(input, source.family)
      return handleAnnounce(kind.frontend, announce, { input, allocate }, source, rules, deps)
    }
    if (typeof input === 'string') {
      const parsed = parseScrape(input)
      if (parsed.infoHashes.length === 0) return fullScrape(source)
      return scrape({ frontend: 'http', scrape: parsed, source }, writeScrapeReply)
    }
    // More of them would make a reply that does not fit one datagram.
    const parsed = parseUdpScrape(input, Math.min(rules.config.scrapeMax, udpScrapeMax))
    return scrape({ frontend: 'udp', scrape: parsed, source }, (files) =>
      writeUdpScrape(input, parsed, files),
    )
  }

  const scrape = (request: ScrapeRequest, write: (files: SwarmFiles) => Buffer) => {
    const { infoHashes } = request.scrape
    const max = rules.config.scrapeMax
    if (infoHashes.length > max)
      throw new ClientError('bad_scrape', `too many infohashes: at most ${max} in one scrape`)
    const waiting = runHooks(rules.scrapeHooks, (hook) => hook.scrape?.(request))
    return waiting
      ? waiting.then(async () => scrapeReply(infoHashes, store, write))
      : scrapeReply(infoHashes, store, write)
  }

  /** All swarms, for those who may ask; one at a time, since it may be 100 MB. */
  const fullScrape = async (source: Ip): Promise<Buffer> => {
    if (!rules.config.fullScrapeNetworks.some((cidr) => cidrContains(cidr, source)))
      throw new ClientError('bad_infohash', 'no info_hash parameter supplied')
    if (fullScrapes > 0)
      throw new ClientError('busy', 'another full scrape is under way', { retryInMinutes: 1 })
    fullScrapes++
    try {
      const files = new Map<InfoHash, SwarmCounts>()
      for await (const part of store.swarms())
        for (const [infoHash, counts] of part) files.set(infoHash, counts)
      return writeScrapeReply(files)
    } finally {
      fullScrapes--
    }
  }

  return {
    epoch: deps.epoch,
    announce: (rawQuery, source) => answer(kinds.http.announce, rawQuery, source, allocateReply),
    scrape: (rawQuery, source) => answer(kinds.http.scrape, rawQuery, source, allocateReply),
    packet: (packet, action, source, allocate = allocateReply) =>
      answer(kinds.udp[action], packet, source, allocate),
    counts: (infoHash) => store.scrape(infoHash),
    totals: () => store.totals(),
    replaceRules: (next) => {
      rules = sortHooks(next)
    },
  }
}

interface RequestKind {
  readonly frontend: Frontend
  readonly action: TrackerAction
}

const kinds = {
  http: {
    announce: { frontend: 'http', action: 'announce' },
    scrape: { frontend: 'http', action: 'scrape' },
  },
  udp: { announce: { frontend: 'udp', action: 'announce' }, scrape: { frontend: 'udp', action: 'scrape' } },
} as const satisfies Record<Frontend, Record<TrackerAction, RequestKind>>

/** Rules with the hooks that have something to do, by what they do. */
interface SortedRules extends TrackerRules {
  readonly announceHooks: readonly PreHook[]
  readonly scrapeHooks: readonly PreHook[]
  readonly peerHooks: readonly PreHook[]
}

function sortHooks(rules: TrackerRules): SortedRules {
  const { hooks } = rules
  return {
    ...rules,
    announceHooks: hooks.filter((hook) => hook.announce !== undefined),
    scrapeHooks: hooks.filter((hook) => hook.scrape !== undefined),
    peerHooks: hooks.filter((hook) => hook.peers !== undefined),
  }
}

/** Runs hooks in order; a promise only from the first one that does not answer at once. */
function runHooks(
  hooks: readonly PreHook[],
  run: (hook: PreHook) => void | Promise<void>,
): Promise<void> | undefined {
  for (let i = 0; i < hooks.length; i++) {
    const hook = hooks[i]
    const waiting = hook && run(hook)
    if (waiting) {
      return waiting.then(async () => {
        for (const later of hooks.slice(i + 1)) await run(later)
      })
    }
  }
  return undefined
}

/** What a reply is written of. Valid only until the next announce. */
interface Answer {
  readonly announce: Announce
  readonly source: Ip
  readonly reply: Omit<AnnounceReply, 'peers'>
  readonly peers: StoreReply['peers']
}

/** What is answered, and where a packet's reply goes. */
interface ReplyTarget {
  readonly input: string | Buffer
  readonly allocate: AllocateReply
}

function handleAnnounce(
  frontend: Frontend,
  announce: Announce,
  target: ReplyTarget,
  source: Ip,
  rules: SortedRules,
  deps: TrackerDeps,
): Buffer | Promise<Buffer> {
  const request: AnnounceRequest = {
    frontend,
    announce,
    source: addressOf(announce, source, rules.config),
    place: undefined,
    trackerId: undefined,
    extraIntervalSeconds: 0,
    extraMinIntervalSeconds: 0,
  }
  const waiting =
    rules.announceHooks.length > 0
      ? runHooks(rules.announceHooks, (hook) => hook.announce?.(request))
      : undefined
  return waiting
    ? waiting.then(() => storeAndReply(request, target, rules, deps))
    : storeAndReply(request, target, rules, deps)
}

/** What a peer says of its address counts only from networks that were configured for it; 0.0.0.0 means the source. */
function addressOf(announce: Announce, source: Ip, { trustedAnnouncers }: TrackerConfig): Ip {
  const claimed = announce.ip ?? announce.ipv4 ?? announce.ipv6
  if (claimed === undefined || !trustedAnnouncers.some((cidr) => cidrContains(cidr, source))) return source
  const ip = parseIp(claimed)
  if (!ip) throw new ClientError('bad_address', 'failed to parse peer IP address')
  return isUnspecified(ip) ? source : ip
}

function storeAndReply(
  request: AnnounceRequest,
  target: ReplyTarget,
  rules: SortedRules,
  deps: TrackerDeps,
): Buffer | Promise<Buffer> {
  const work = new AnnounceWork(request, rules)
  const reply = deps.store.announce(work)
  return reply instanceof Promise
    ? reply.then((late) => write(target, answerOf(request, work, late, rules, deps)))
    : write(target, answerOf(request, work, reply, rules, deps))
}

function write({ input, allocate }: ReplyTarget, answer: Answer): Buffer {
  return typeof input === 'string' ? writeHttp(answer) : writeUdp(input, answer, allocate)
}

/**
 * 0 ≤ chance < 1, the same for each announce of a peer in a swarm, on every server: one that has heard only an older announce of it does not take
 * it to live longer than one that has heard the newest.
 */
function chanceOf({ infoHash, source, port }: Pick<StoreAnnounce, 'infoHash' | 'source' | 'port'>): number {
  let hash = mix(Number.parseInt(infoHash.slice(0, 8), 16), port)
  for (const byte of source.bytes) hash = mix(hash, byte)
  return finish(hash) / 2 ** 32
}

/** One announce as the store sees it, and what it has chosen with what the store told it. */
class AnnounceWork implements StoreAnnounce {
  readonly source: Ip
  readonly port: number
  readonly raw: Announce['raw']
  readonly place: PlaceId
  readonly ancestors: readonly Ancestor[]
  readonly left: number
  readonly event: Announce['event']
  readonly ownFamilyOnly: boolean
  readonly withPeerIds: boolean
  readonly numwant: number
  intervalMs: number
  gateway = false
  readonly #announce: Announce
  readonly #config: TrackerConfig
  readonly #shares: readonly number[]

  constructor(
    { announce, source, place, frontend }: AnnounceRequest,
    { topology, config, peerHooks }: SortedRules,
  ) {
    this.#announce = announce
    this.source = source
    this.port = announce.port
    this.raw = announce.raw
    this.place = place === undefined ? topology.placeOfAddress(source) : topology.idOf(place)
    this.ancestors = topology.ancestorsOf(this.place)
    this.left = announce.left
    this.event = announce.event
    this.ownFamilyOnly = frontend === 'udp'
    this.withPeerIds = !announce.compact || peerHooks.length > 0
    this.intervalMs = config.announceIntervalMs
    const fits = frontend === 'udp' ? udpPeersMax[source.family] : config.numwantMax
    this.numwant = Math.min(announce.numwant ?? config.numwantDefault, config.numwantMax, fits)
    this.#config = config
    this.#shares = topology.shares
  }

  get infoHash(): InfoHash {
    return this.#announce.infoHash
  }

  get peerId(): Uint8Array {
    return this.#announce.peerId
  }

  lifetimeMs({ complete, incomplete }: SwarmCounts): number {
    this.intervalMs = announceIntervalMs(
      { complete, incomplete, seeding: this.left === 0 },
      this.#config,
      chanceOf(this),
    )
    return lifetimeMs(this.intervalMs)
  }

  choose(view: SwarmView): Plan {
    const { gatewaysPerRack, reservePeers } = this.#config
    const plan = planSelection({
      view,
      seeding: this.left === 0,
      numwant: this.numwant,
      gatewaysPerRack,
      reservePeers,
      shares: this.#shares,
    })
    this.gateway = plan.gateway
    return plan
  }
}

const udpReplyHeadBytes = 20
/** Peers that fit one datagram. */
const udpPeersMax = {
  4: Math.floor((udpReplyMax[4] - udpReplyHeadBytes) / 6),
  6: Math.floor((udpReplyMax[6] - udpReplyHeadBytes) / 18),
}

function answerOf(
  request: AnnounceRequest,
  work: AnnounceWork,
  { counts, peers }: StoreReply,
  { config, peerHooks }: SortedRules,
  { store, epoch, after }: TrackerDeps,
): Answer {
  const { announce, source } = request
  if (peerHooks.length > 0) {
    let shaped: ReturnType<NonNullable<PreHook['peers']>> = peers.toPeers()
    for (const hook of peerHooks) shaped = hook.peers?.(request, shaped) ?? shaped
    peers.fill(shaped)
  }
  after?.add({ announce, endpoint: endpoint(source, announce.port), counts })
  return {
    announce,
    source,
    peers,
    reply: {
      complete: counts.complete,
      incomplete: counts.incomplete,
      downloaded: counts.downloaded,
      intervalSeconds: Math.max(1, Math.round(work.intervalMs / 1000)) + request.extraIntervalSeconds,
      minIntervalSeconds:
        Math.max(1, Math.round(config.minAnnounceIntervalMs / 1000)) + request.extraMinIntervalSeconds,
      externalIp: source.bytes,
      trackerId: request.trackerId,
      rackswarm: announce.rackswarm ? { epoch: store.epoch ?? epoch, gateway: work.gateway } : undefined,
    },
  }
}

function writeHttp({ announce, reply, peers }: Answer): Buffer {
  return announce.compact
    ? writeCompactAnnounceReply(reply, peers)
    : writeAnnounceReply({ ...reply, peers: peers.toPeers() }, false)
}

/** The reply has the family of the packet, whatever address the peer is registered under. */
function writeUdp(packet: Buffer, { source, reply, peers }: Answer, allocate: AllocateReply): Buffer {
  const { family } = source
  const bytes = peers.lengths[family] * (family === 4 ? 6 : 18)
  const target = allocate(udpReplyHeadBytes + bytes)
  writeUdpAnnounceHeader(target, 0, {
    action: packet[11] === udpActions.oldIpv6Announce ? udpActions.oldIpv6Announce : udpActions.announce,
    transactionId: readUdpTransactionId(packet),
    intervalSeconds: reply.intervalSeconds,
    leechers: reply.incomplete,
    seeders: reply.complete,
  })
  const compact = peers.compact[family]
  for (let i = 0; i < bytes; i++) target[udpReplyHeadBytes + i] = compact[i] ?? 0
  return target
}

function writeUdpFailure(packet: Buffer, message: string, family: Family): Buffer {
  const target = Buffer.allocUnsafe(udpReplyMax[family])
  return target.subarray(
    0,
    writeUdpError(target, 0, readUdpTransactionId(packet), message, udpReplyMax[family]),
  )
}

type SwarmFiles = ReadonlyMap<InfoHash, SwarmCounts>

function writeUdpScrape(packet: Buffer, { infoHashes }: Scrape, files: SwarmFiles): Buffer {
  const counts = infoHashes.map(
    (infoHash) => files.get(infoHash) ?? { complete: 0, incomplete: 0, downloaded: 0 },
  )
  const target = Buffer.allocUnsafe(8 + 12 * counts.length)
  return target.subarray(0, writeUdpScrapeReply(target, 0, readUdpTransactionId(packet), counts))
}

function scrapeReply(
  infoHashes: readonly InfoHash[],
  store: PeerStore,
  write: (files: SwarmFiles) => Buffer,
): Buffer | Promise<Buffer> {
  const files = new Map<InfoHash, SwarmCounts>()
  const late: Promise<void>[] = []
  for (const infoHash of infoHashes) {
    const counts = store.scrape(infoHash)
    if (counts instanceof Promise) late.push(counts.then((known) => void files.set(infoHash, known)))
    else files.set(infoHash, counts)
  }
  return late.length === 0 ? write(files) : Promise.all(late).then(() => write(files))
}

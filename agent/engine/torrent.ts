import { stat } from 'node:fs/promises'
import type { Dispatcher } from 'undici'
import { formatAddress, formatEndpoint } from '../../lib/protocol/address.ts'
import { distanceUnknown } from '../../lib/protocol/announce.ts'
import { infoHashToBytes } from '../../lib/protocol/infohash.ts'
import type { Metainfo } from '../../lib/protocol/metainfo.ts'
import { pieceCount, pieceHashes } from '../../lib/protocol/metainfo.ts'
import { errorCode } from '../../lib/runtime/files.ts'
import type {
  EngineConfig,
  EngineHandle,
  EnginePeer,
  FetchOptions,
  PeerState,
  PeerTraffic,
  PieceRange,
  SeedOptions,
  Webseed,
} from './engine.ts'
import type { Busy, ExtendedHandshake } from './extended.ts'
import { extendedHandshakeId, writeExtendedHandshake } from './extended.ts'
import type { Limiter } from './limiter.ts'
import type { Link, Shaken } from './link.ts'
import type { PeerHost } from './peer.ts'
import { Peer, requestsMax } from './peer.ts'
import type { Ask, PickOptions } from './picker.ts'
import { Picker } from './picker.ts'
import type { PieceStore, PieceWriter } from './piece-store.ts'
import type { Lease, ReadCache, SeedFile } from './read-cache.ts'
import {
  aheadOf,
  blockBytesOf,
  claimAgainMs,
  dueInMs,
  hedgeInMs,
  isAskedEnough,
  isLate,
  Reach,
  redialAfterMs,
  redialMs,
  reserveStep,
  silentMs,
  standstillRate,
  uploadSlots,
  uselessMs,
  webseedAfterMs,
} from './schedule.ts'
import { shownAhead, SuperSeeder } from './super-seeder.ts'
import { createSuspects } from './suspects.ts'
import { AllTurns } from './turns.ts'
import { TrafficSums } from './traffic.ts'
import type { Claim, WebseedLanes } from './webseed-source.ts'
import { createWebseedLanes, runWebseed } from './webseed-source.ts'
import type { Block } from './wire.ts'
import { blockBytes, messages, writeBitfield, writeExtended, writeSimple } from './wire.ts'

export interface TorrentDeps {
  /** Milliseconds since some start; it never goes back. */
  readonly monotonic: () => number
  readonly random: () => number
  readonly config: EngineConfig
  readonly limiter: Limiter
  readonly store: PieceStore
  readonly cache: ReadCache
  readonly dispatcher: Dispatcher
  readonly peerId: Uint8Array
  readonly port: number
  /** Dials and shakes hands. @throws Error where that fails */
  connect(peer: EnginePeer, infoHash: Uint8Array): Promise<{ link: Link; shaken: Shaken }>
  closed(): void
}

export const tickMs = 250
/** Peers to try that are remembered, 300 bytes each; a tracker's reply has at most 100. Those that failed go first. */
const candidatesMax = 10_000
const distancesMax = 1_000
const dialsMax = 16
/** A peer that refuses what it was asked is left in peace for this long; doubled with each refusal, until it gives something. */
const refusedMs = 50
const refusedMaxMs = 10_000
/** An agent that has no turn for us is asked again after this long at most. */
const turnMaxMs = 1_000
/** …and one that says when it has one, after this long. */
const calledMaxMs = 2_000
/** Who has refused more pieces than that, one after the other, is left in peace for a while, but for one piece each time that it calls. */
const triesMax = 4
/** Who is refused more than once within so long is told only once why. */
const busyAgainMs = 50
/** Who has not shown by then that it may take part is let go. */
const admissionMs = 5_000
/** A connection that has moved nothing for this long gives way where all are taken. */
const idleMs = 1_000
/** Connections for peers that have something we lack: those that have nothing cannot take them. */
const usefulShare = 1 / 3
const diskRetryMs = 1_000
/** A disk that is full for this long ends the fetch, so that others may have its turn. */
const diskFullMs = 30_000
/** Checks of what is on disk that are under way at once. */
const checksMax = 4

interface Candidate {
  peer: EnginePeer
  nextMs: number
  failures: number
  dialling: boolean
}

/** One torrent: its peers, what is asked of them, and what has come. */
export class Torrent implements EngineHandle, PeerHost {
  readonly metainfo: Metainfo
  readonly infoHash: Uint8Array
  readonly pieceCount: number
  readonly done: Promise<void>
  readonly #deps: TorrentDeps
  readonly #have: Uint8Array
  readonly #picker: Picker
  readonly #peers = new Set<Peer>()
  readonly #candidates = new Map<string, Candidate>()
  /** Those of them that could not be dialled. */
  readonly #failed = new Set<string>()
  /** How far the tracker says that `ip:port` is; oldest out first. */
  readonly #distances = new Map<string, number>()
  readonly #reach = new Reach()
  /** As it was when the peers were last told. */
  #asksFar = true
  readonly #turns = new AllTurns<Peer>()
  #fillTimer: NodeJS.Timeout | undefined
  readonly #suspects
  readonly #past = new TrafficSums()
  /** Pieces that neighbours were told are being fetched, and from how far. */
  readonly #claims = new Map<number, number>()
  #claimedAtMs = 0
  readonly #memory = new Map<number, Uint8Array>()
  /** Pieces whose memory a thread is reading. */
  readonly #writing = new Set<number>()
  readonly #outcome = Promise.withResolvers<undefined>()
  readonly #signal: AbortSignal
  readonly #onAbort: () => void
  readonly #writer: PieceWriter
  readonly #seedFile: SeedFile
  readonly #file: string
  readonly #sha1s: string[]
  readonly #seeds: () => number | undefined
  #superSeeder: SuperSeeder<Peer> | undefined
  #spare: Uint8Array | undefined
  #bytesVerified = 0
  #listener: ((piece: number) => void) | undefined
  #ready: boolean
  #complete: boolean
  #closing: Promise<void> | undefined
  #dialling = 0
  #farTimer: NodeJS.Timeout | undefined
  #movedAtMs: number
  /** When a peer last gave a block. */
  #givenAtMs: number
  #bytesSeen = 0
  /** What the fastest peer gives, bytes a second. */
  #bestRate = 0
  #bytesReceived = 0
  #diskFullSinceMs: number | undefined
  #webseed: Webseed | undefined
  /** Asks for what is missing, as long as it stands here. */
  #webseedRun: { readonly url: string } | undefined
  readonly #webseedEnd = new AbortController()
  readonly #webseedLanes: WebseedLanes
  #isRangeDone = false
  /** Ranges, by their first piece, that it has said it is done with. Nobody else is given them for a while, so what is lost of them on the way is still for this host to fetch. */
  readonly #owedRanges = new Map<number, PieceRange>()

  constructor(options: FetchOptions | SeedOptions, kind: 'fetch' | 'seed', deps: TorrentDeps) {
    const { metainfo } = options
    this.metainfo = metainfo
    this.infoHash = infoHashToBytes(metainfo.infoHash)
    this.pieceCount = pieceCount(metainfo)
    this.#deps = deps
    this.#file = options.file
    this.#complete = kind === 'seed'
    this.#ready = kind === 'seed'
    this.#have = new Uint8Array(this.pieceCount).fill(kind === 'seed' ? 1 : 0)
    this.#bytesVerified = kind === 'seed' ? metainfo.length : 0
    this.#picker = new Picker({
      pieceCount: this.pieceCount,
      pieceLength: metainfo.pieceLength,
      length: metainfo.length,
      random: deps.random,
    })
    this.#suspects = createSuspects(deps.monotonic, (address) => {
      deps.config.peerBanned?.(address, metainfo.infoHash)
    })
    this.#movedAtMs = this.#givenAtMs = deps.monotonic()
    this.#webseedLanes = createWebseedLanes(() => deps.limiter.rate('download'), deps.monotonic)
    this.#writer = deps.store.open(options.file)
    this.#seedFile = deps.cache.open(options.file)
    this.#sha1s = pieceHashes(metainfo)
    this.#seeds = options.seeds ?? (() => undefined)
    this.done = this.#outcome.promise.then(() => undefined)
    // Who does not wait for it must not be killed by it.
    this.done.catch(() => undefined)
    this.#signal = options.signal
    this.#onAbort = () => {
      this.#fail(
        this.#signal.reason instanceof Error ? this.#signal.reason : new Error('the fetch was aborted'),
      )
    }
    this.#signal.addEventListener('abort', this.#onAbort, { once: true })
    if (kind === 'seed') this.#outcome.resolve(undefined)
    else {
      this.#webseed = 'webseed' in options ? options.webseed : undefined
      void this.#checkPart()
    }
    void this.#takeCandidates(options.peers)
  }

  has(piece: number): boolean {
    return this.#have[piece] === 1
  }

  onPiece(listener: (piece: number) => void): void {
    this.#listener = listener
  }

  get bytesVerified(): number {
    return this.#bytesVerified
  }

  get peerCount(): number {
    return this.#peers.size
  }

  get waitingReason(): string | undefined {
    const now = this.#deps.monotonic()
    if (this.#closing) return 'closed'
    if (this.#complete) return undefined
    if (this.#diskFullSinceMs !== undefined) return `the disk is full: ${this.#file} waits for room`
    if (now - this.#movedAtMs < 2_000) return undefined
    if (!this.#ready) return 'the part on disk is being checked'
    const peers = this.#admitted()
    const webseed = this.#webseedRun ? '; the webseed gives nothing either' : ''
    if (peers.length === 0) {
      const tried = this.#candidates.size
      const also = tried === 0 ? '' : ` (${tried} known)`
      return `no peer answers${also}${webseed}`
    }
    if (peers.every((peer) => !peer.interesting))
      return `none of ${peers.length} peers has a piece that is missing${webseed}`
    if (peers.every((peer) => peer.choked)) return `all of ${peers.length} peers are choking${webseed}`
    return `${peers.length} peers send nothing${webseed}`
  }

  traffic(): PeerTraffic[] {
    const sums = this.#past.copy()
    for (const peer of this.#peers) addTo(sums, peer)
    return sums.list()
  }

  peers(): PeerState[] {
    return [...this.#peers].map((peer) => ({
      source: peer.source,
      host: peer.hostName,
      place: peer.placeName,
      distance: peer.distance,
      incoming: peer.link.incoming,
      downloadRate: peer.download.rate,
      uploadRate: peer.upload.rate,
      requestedBytes: peer.requestedBytes,
      owedBytes: peer.owedBytes,
      progress: this.#hasAll(peer)
        ? 1
        : (peer.picking ? this.#picker.countOf(peer.picking) : 0) / this.pieceCount,
      waiting: this.#waitingFor(peer),
    }))
  }

  setWebseed(webseed: Webseed | undefined): void {
    this.#webseed = webseed
    this.#isRangeDone = false
    this.#startWebseed()
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  // What the engine tells it.

  /** A connection whose handshake named this torrent. */
  add(link: Link, shaken: Shaken, known: EnginePeer | undefined): void {
    if (this.#closing) {
      link.socket.destroy()
      return
    }
    const { handshake } = shaken
    const peer = new Peer(link, handshake, {
      host: this,
      limiter: this.#deps.limiter,
      // Who has dialled us says in its first message where it listens, and so who it is.
      distance: known?.distance ?? distanceUnknown,
      now: this.#deps.monotonic,
    })
    if (this.#suspects.isBanned(peer.sender) || !this.#hasRoom() || this.#isSurplus(peer)) {
      link.socket.destroy()
      return
    }
    this.#peers.add(peer)
    const { admission } = this.#deps.config
    if (admission && !handshake.extended) {
      peer.close('it shows no token')
      return
    }
    if (admission) {
      peer.timer = setTimeout(() => {
        if (peer.picking === undefined) peer.close('it shows no token')
      }, admissionMs)
    }
    // A stranger who has dialled us learns nothing before it has shown its token.
    if (handshake.extended && !(admission && link.incoming)) this.#introduce(peer)
    if (!admission) this.#admit(peer)
    peer.start(shaken.rest)
  }

  tick(): void {
    if (this.#closing || (this.#complete && this.#peers.size === 0)) return
    const now = this.#deps.monotonic()
    for (const peer of this.#peers) {
      peer.tick(now)
      this.#watch(peer, now)
    }
    for (const peer of this.#peers) this.#showMore(peer)
    this.#callNext(now)
    if (this.#complete || !this.#ready) return
    // A block of a slow link takes seconds.
    let rate = 0
    this.#bestRate = 0
    let isIdle = this.#webseedLanes.runs.size === 0
    for (const { download, asks } of this.#peers) {
      isIdle &&= asks.size === 0
      rate += download.rate
      this.#bestRate = Math.max(this.#bestRate, download.rate)
    }
    if (this.#bytesReceived > this.#bytesSeen || rate >= standstillRate) {
      this.#bytesSeen = this.#bytesReceived
      this.#movedAtMs = now
    }
    const isAwaited = this.#picker.isAwaited(now)
    const isOffered = () =>
      [...this.#peers].some(({ picking }) => picking !== undefined && this.#picker.interests(picking))
    this.#reach.tick({ movedAtMs: this.#movedAtMs, isAwaited, isIdle, isOffered }, now)
    const asksFar = this.#reach.mayAsk(distanceUnknown, now)
    for (const peer of this.#peers)
      if (asksFar !== this.#asksFar || (!asksFar && peer.distance > 0 && peer.interesting)) this.#review(peer)
    this.#asksFar = asksFar
    this.#claimAgain(now)
    this.#dialMore(now)
    this.#fill()
  }

  // What its peers tell it.

  pieceSize(piece: number): number {
    return this.#picker.pieceSize(piece)
  }

  offers(piece: number): boolean {
    return this.#have[piece] === 1
  }

  changed(peer: Peer): void {
    if (peer.picking === undefined) return
    this.#review(peer)
    this.#showMore(peer)
    this.#pump(peer)
  }

  gained(peer: Peer, piece: number): void {
    if (peer.picking === undefined || peer.closedWhy !== undefined) return
    const mayBegin = this.#picker.gains(peer.picking.slot, piece)
    this.#turns.at(peer.distance).going.end(piece, this.#deps.monotonic(), peer)
    this.#superSeeder?.gained(peer, piece)
    this.#showMore(peer)
    this.#partFrom(peer)
    if (this.#complete || this.#have[piece] === 1 || !this.#mayAsk(peer)) return
    peer.setInteresting(true)
    // What is asked of others already, or may not be asked of it, is no reason to look again.
    if (mayBegin) this.#pump(peer)
  }

  gainedThese(peer: Peer, bits: Uint8Array): void {
    if (peer.picking === undefined || peer.closedWhy !== undefined) return
    for (let piece = 0; piece < this.pieceCount; piece++) {
      if (((bits[piece >> 3] ?? 0) & (0x80 >> (piece & 7))) === 0) continue
      this.#picker.gains(peer.picking.slot, piece)
      this.#superSeeder?.gained(peer, piece)
    }
    this.#partFrom(peer)
  }

  /** Two that have everything have nothing to say to each other. */
  #partFrom(peer: Peer): void {
    if (this.#complete && this.#showsAll(peer)) peer.close('both have everything')
  }

  introduced(peer: Peer, { own, port }: ExtendedHandshake): void {
    const { admission } = this.#deps.config
    if (!admission) this.#placeAt(peer, own?.place)
    if (port !== undefined && peer.link.incoming) {
      const address = formatAddress(peer.link.ip, port)
      this.#place(peer, Math.min(peer.distance, this.#distances.get(address) ?? distanceUnknown))
      // Two hosts that dial each other tell by this that they need no second connection.
      this.#known(address)
    }
    if (!admission) {
      this.#review(peer)
      this.#pump(peer)
      return
    }
    if (own?.token === undefined) {
      peer.close('it shows no token')
      return
    }
    if (peer.checking) return
    peer.checking = true
    void admission.admit(own.token, this.metainfo.infoHash, peer.link).then((admitted) => {
      peer.checking = false
      if (peer.closedWhy !== undefined) return
      if (admitted === undefined) {
        peer.close('its token is not good')
        return
      }
      peer.admittedUntilMs = admitted.untilMs
      peer.proven = admitted
      this.#placeAt(peer, admitted.place ?? own.place)
      if (peer.picking !== undefined) return
      if (peer.link.incoming) this.#introduce(peer)
      this.#admit(peer)
    })
  }

  claimed(peer: Peer, pieces: readonly number[]): void {
    if (peer.picking === undefined) return
    for (const piece of pieces) this.#picker.claimed(peer.picking, piece, this.#deps.monotonic())
  }

  unclaimed(peer: Peer, pieces: readonly number[]): void {
    if (peer.picking === undefined) return
    for (const piece of pieces) this.#picker.unclaimed(peer.picking, piece)
    this.#fillSoon(1)
  }

  targetOf(ask: Ask): Uint8Array | undefined {
    // A block that another peer has brought meanwhile must not be written over: its piece may be being hashed.
    if (this.#picker.isHere(ask)) return undefined
    return this.#memory.get(ask.piece)?.subarray(ask.offset, ask.offset + ask.length)
  }

  received(peer: Peer, ask: Ask): void {
    this.#bytesReceived += ask.length
    this.#givenAtMs = this.#deps.monotonic()
    peer.refusals = 0
    this.#suspects.received(ask.piece, peer.sender)
    const whole = this.#take(ask)
    if (whole) {
      this.#turns.came(ask.piece, this.#givenAtMs)
      void this.#finishPiece(ask.piece)
    }
    this.#pump(peer)
    if (whole) this.#fill()
  }

  mayGive(peer: Peer, { piece }: Block): boolean {
    if (!this.#takesTurns(peer)) return true
    const nowMs = this.#deps.monotonic()
    const { going } = this.#turns.at(peer.distance)
    if (going.has(piece, peer)) {
      going.goOn(piece)
      return true
    }
    const isFull = !going.hasRoom(nowMs)
    if (isFull || going.isTaken(piece, peer, nowMs)) {
      if (isFull) going.wait(peer)
      // A request for each block of a piece is refused; the list is told once.
      if (nowMs - peer.toldBusyAtMs >= busyAgainMs) {
        peer.toldBusyAtMs = nowMs
        peer.tellBusy({ isFull, pieces: going.piecesAt(nowMs) })
      }
      return false
    }
    going.begin(piece, peer, nowMs)
    return true
  }

  gave(peer: Peer, { piece, length }: Block): void {
    const { going } = this.#turns.at(peer.distance)
    const nowMs = this.#deps.monotonic()
    going.moved(piece, peer, length, this.pieceSize(piece), nowMs)
    if (!going.has(piece, peer)) this.#callNext(nowMs)
    else if (!peer.isOwed(piece)) going.rest(piece, nowMs)
  }

  /** Tells those who wait longest for a turn that there is one. */
  #callNext(nowMs: number): void {
    for (const going of this.#turns.going)
      going.nextWaiting(nowMs)?.tellBusy({ isFull: false, pieces: going.piecesAt(nowMs) })
  }

  tookBack(peer: Peer, piece: number): void {
    const { going } = this.#turns.at(peer.distance)
    if (going.has(piece, peer)) going.drop(piece)
  }

  /** A block is here; who else was asked for it need not send it. @returns whether its piece is whole */
  #take(ask: Ask): boolean {
    const { whole, surplus } = this.#picker.received(ask)
    for (const other of surplus) {
      this.#picker.release(other)
      for (const slower of this.#peers) if (slower.picking === other.peer) slower.withdraw(other)
    }
    return whole
  }

  refused(peer: Peer, asks: readonly Ask[]): void {
    for (const ask of asks) {
      this.#release(ask, peer)
      this.#giveBack(ask.piece)
    }
    const now = this.#deps.monotonic()
    if (this.#takesTurns(peer)) {
      this.#waitForTurn(peer, asks, now)
      return
    }
    // A burst counts once.
    if (now < peer.askAgainMs) return
    peer.askAgainMs = now + Math.min(refusedMaxMs, refusedMs * 2 ** peer.refusals++)
  }

  /** Its engine is ours: it refuses what it is sending to others already, and so may we. */
  #takesTurns({ introduction, handshake }: Peer): boolean {
    return introduction?.claimId !== undefined && handshake.fast
  }

  /** The peer is sending the piece to somebody else, or enough others: it is asked for another, and for this one later. */
  #waitForTurn(peer: Peer, asks: readonly Ask[], nowMs: number): void {
    for (const { piece } of asks) {
      this.#keepFrom(peer, piece, nowMs)
      // Each block of it is refused.
      if (piece !== peer.refusedPiece) peer.refusals++
      peer.refusedPiece = piece
    }
    // Who says what it is sending to others may be asked for something else at once.
    if (peer.introduction?.busyId !== undefined && peer.refusals <= triesMax) this.#fillSoon(1)
    else this.#leaveInPeace(peer, nowMs)
  }

  busy(peer: Peer, { isFull, pieces }: Busy): void {
    const nowMs = this.#deps.monotonic()
    for (const piece of pieces) this.#keepFrom(peer, piece, nowMs)
    const isCalled = peer.willCall && !isFull
    peer.willCall = isFull
    if (isFull) {
      peer.askAgainMs = nowMs + Math.min(calledMaxMs, this.#turns.at(peer.distance).coming.usualMs)
      return
    }
    if (isCalled) peer.refusals = Math.min(peer.refusals, triesMax)
    if (peer.refusals > triesMax) return
    peer.askAgainMs = 0
    this.#fillSoon(1)
  }

  /** The peer is sending a piece to somebody else: it is not asked for it for as long as a piece usually takes. */
  #keepFrom(peer: Peer, piece: number, nowMs: number): void {
    const { usualMs } = this.#turns.at(peer.distance).coming
    peer.busyWith.set(piece, nowMs + Math.min(turnMaxMs, usualMs))
  }

  #leaveInPeace(peer: Peer, nowMs: number): void {
    const { usualMs } = this.#turns.at(peer.distance).coming
    const waitMs = Math.min(turnMaxMs, Math.max(1, usualMs / 8))
    peer.askAgainMs = Math.max(peer.askAgainMs, nowMs + waitMs)
    this.#fillSoon(waitMs)
  }

  #fillSoon(waitMs: number): void {
    this.#fillTimer ??= setTimeout(() => {
      this.#fillTimer = undefined
      this.#fill()
    }, waitMs)
  }

  /** What nobody sends, and nothing of which is here, is as if it had not been asked for. */
  #giveBack(piece: number): void {
    if (this.#picker.isIdle(piece)) this.#dropBegun(piece)
  }

  #dropBegun(piece: number): void {
    this.#forget(piece)
    this.#freeMemory(piece)
    this.#turns.drop(piece)
  }

  /** The piece is missing again; who was told that it is being fetched may fetch it. */
  #forget(piece: number): void {
    this.#picker.forget(piece)
    const distance = this.#claims.get(piece)
    if (distance === undefined) return
    this.#claims.delete(piece)
    for (const neighbour of this.#toldOf(distance)) neighbour.unclaim([piece])
  }

  read(block: Block, done: (lease: Lease | undefined, error?: Error) => void): void {
    this.#seedFile.read(
      block.piece * this.metainfo.pieceLength + block.offset,
      block.length,
      (lease, error) => {
        if (lease === undefined || lease.bytes.length === block.length) {
          done(lease, error)
          return
        }
        // The block lies in two chunks.
        const first = Buffer.from(lease.bytes)
        lease.release()
        this.read(
          { piece: block.piece, offset: block.offset + first.length, length: block.length - first.length },
          (more, wrong) => {
            if (more === undefined) done(undefined, wrong)
            else {
              const bytes = Buffer.concat([first, more.bytes])
              more.release()
              done({ bytes, release: () => undefined })
            }
          },
        )
      },
    )
  }

  closed(peer: Peer): void {
    this.#peers.delete(peer)
    addTo(this.#past, peer)
    const asks = [...peer.asks]
    peer.asks.clear()
    for (const ask of asks) this.#release(ask, peer)
    if (peer.picking) this.#picker.leave(peer.picking)
    this.#turns.leave(peer)
    this.#countNeighbours()
    if (!this.#closing && !this.#complete) for (const { piece } of asks) this.#giveBack(piece)
    this.#superSeeder?.leave(peer)
    const candidate = this.#candidates.get(peer.source)
    if (candidate) candidate.nextMs = this.#deps.monotonic() + redialMs
    if (!this.#closing && !peer.choking) this.#serveNext()
    if (this.#closing || this.#complete) return
    this.#fill()
  }

  // Peers.

  #admitted(): Peer[] {
    return [...this.#peers].filter((peer) => peer.picking !== undefined)
  }

  #introduce(peer: Peer): void {
    const { config, port } = this.#deps
    const { identity, peerTokens } = config
    // An agent is known by its peer id before it says anything; others are told nothing of us.
    const isAgent = Buffer.from(peer.handshake.peerId).toString('latin1', 0, 3) === '-RS'
    peer.send(
      writeExtended(
        extendedHandshakeId,
        writeExtendedHandshake({
          requestsMax,
          port,
          client: 'Rackswarm',
          own: isAgent
            ? {
                host: identity.host,
                place: identity.place,
                token: peerTokens?.tokenFor(this.metainfo.infoHash),
                load: Math.min(1, this.#peers.size / config.connectionsMax),
                isSeed: this.#complete,
              }
            : undefined,
        }),
      ),
    )
  }

  #admit(peer: Peer): void {
    clearTimeout(peer.timer)
    peer.timer = undefined
    peer.picking = this.#picker.join(peer.distance)
    if (this.#isOnlySeed()) {
      if (peer.handshake.fast) peer.send(writeSimple(messages.haveNone))
      this.#superSeeder ??= this.#createSuperSeeder()
      this.#superSeeder.join(peer)
    } else if (this.#complete) {
      peer.send(peer.handshake.fast ? writeSimple(messages.haveAll) : writeBitfield(this.#bits()))
    } else if (this.#bytesVerified > 0) {
      peer.send(writeBitfield(this.#bits()))
    } else if (peer.handshake.fast) {
      peer.send(writeSimple(messages.haveNone))
    }
    peer.admitted()
    this.#countNeighbours()
    this.#review(peer)
    this.#showMore(peer)
  }

  #countNeighbours(): void {
    this.#turns.neighbours = this.#admitted().filter(({ distance }) => distance === 0).length
  }

  /** Nobody else has everything, as far as the tracker knows, nor is every piece somewhere else too. */
  #isOnlySeed(): boolean {
    return this.#complete && this.#seeds() === 1 && this.#superSeeder?.isOver !== true
  }

  #createSuperSeeder(): SuperSeeder<Peer> {
    const seeder = new SuperSeeder<Peer>(this.pieceCount)
    for (const peer of this.#peers) {
      if (peer.picking) for (const piece of this.#picker.piecesOf(peer.picking)) seeder.gained(peer, piece)
    }
    return seeder
  }

  /** Tells a peer of further pieces while this is the only seed, and of all once it is not. */
  #showMore(peer: Peer): void {
    const seeder = this.#superSeeder
    if (seeder === undefined) return
    if (!this.#isOnlySeed()) {
      this.#superSeeder = undefined
      for (const other of this.#peers) for (const piece of seeder.hiddenFrom(other)) other.tellHave(piece)
      return
    }
    const nowMs = this.#deps.monotonic()
    const pieces = seeder.next(peer, {
      ahead: shownAhead(peer.upload, this.metainfo.pieceLength),
      stillForMs: nowMs - peer.sentAtMs,
      nowMs,
    })
    for (const piece of pieces) peer.tellHave(piece)
  }

  #bits(): Uint8Array {
    const bits = new Uint8Array(Math.ceil(this.pieceCount / 8))
    for (let piece = 0; piece < this.pieceCount; piece++)
      if (this.#have[piece] === 1) bits[piece >> 3] = (bits[piece >> 3] ?? 0) | (0x80 >> (piece & 7))
    return bits
  }

  /** Whether it gets what it wants, and whether we want something. */
  #review(peer: Peer): void {
    const { picking } = peer
    if (picking === undefined) return
    // Who hears that it is of no interest any more sends nothing more of what it was asked for.
    if (!this.#complete && !this.#isBegunWith(peer))
      peer.setInteresting(this.#mayAsk(peer) && this.#picker.interests(picking))
    if (peer.interestedInUs && peer.choking) {
      if (this.#mayServe(peer)) peer.setChoking(false)
    } else if (!peer.interestedInUs && !peer.choking) {
      peer.setChoking(true)
      this.#serveNext()
    }
  }

  #mayAsk({ distance }: Peer): boolean {
    return this.#reach.mayAsk(distance, this.#deps.monotonic())
  }

  #serveNext(): void {
    for (const peer of this.#peers) {
      if (peer.picking === undefined || !peer.interestedInUs || !peer.choking) continue
      if (this.#mayServe(peer)) peer.setChoking(false)
      return
    }
  }

  /** Turns bound what is sent to agents: a host that many others found first would be served by few of its own rack. */
  #mayServe(peer: Peer): boolean {
    if (this.#takesTurns(peer)) return true
    return this.#admitted().filter((other) => !other.choking && !this.#takesTurns(other)).length < uploadSlots
  }

  #placeAt(peer: Peer, place: string | undefined): void {
    if (place !== undefined && place === this.#deps.config.identity.place) this.#place(peer, 0)
  }

  #place(peer: Peer, distance: number): void {
    const before = peer.picking
    peer.distance = distance
    if (before === undefined || before.distance === distance) return
    const pieces = this.#picker.piecesOf(before)
    const asks = [...peer.asks]
    this.#picker.leave(before)
    const picking = this.#picker.join(peer.distance)
    peer.picking = picking
    for (const piece of pieces) this.#picker.gains(picking.slot, piece)
    for (const ask of asks) ask.peer = picking
    this.#countNeighbours()
  }

  /** It has everything, whatever part of it it shows. */
  #hasAll(peer: Peer): boolean {
    return this.#showsAll(peer) || peer.introduction?.own?.isSeed === true
  }

  #showsAll({ picking }: Peer): boolean {
    return picking !== undefined && this.#picker.countOf(picking) === this.pieceCount
  }

  /** Where all connections are taken, one that is of no use to either side gives way. */
  #hasRoom(): boolean {
    const max = this.#deps.config.connectionsMax
    const before = this.#deps.monotonic() - idleMs
    const idle = [...this.#peers].filter(
      ({ link, interesting, owedBytes, movedAtMs, upload }) =>
        link.incoming && !interesting && owedBytes === 0 && upload.rate === 0 && movedAtMs < before,
    )
    const full =
      this.#peers.size >= 2 * max || (!this.#complete && idle.length >= 2 * max * (1 - usefulShare))
    if (!full) return true
    const [oldest] = idle
    oldest?.close('others need its place')
    return oldest !== undefined
  }

  /** Two hosts that dial each other keep the connection that the smaller peer id made: both ends decide alike. */
  #isSurplus(peer: Peer): boolean {
    const own = Buffer.from(this.#deps.peerId)
    const theirs = peer.handshake.peerId
    if (own.equals(theirs)) {
      this.#candidates.delete(peer.source)
      this.#failed.delete(peer.source)
      return true
    }
    for (const other of this.#peers) {
      if (!Buffer.from(other.handshake.peerId).equals(theirs)) continue
      const ours = own.compare(theirs) < 0
      const keepsNew = peer.link.incoming !== other.link.incoming && peer.link.incoming !== ours
      if (!keepsNew) return true
      other.close('there is another connection to it')
    }
    return false
  }

  #known(address: string): void {
    const candidate = this.#candidates.get(address)
    if (candidate) candidate.nextMs = Math.max(candidate.nextMs, this.#deps.monotonic() + redialMs)
  }

  async #takeCandidates(peers: AsyncIterable<EnginePeer>): Promise<void> {
    try {
      for await (const peer of peers) {
        if (this.#closing) return
        const address = formatEndpoint(peer.endpoint)
        this.#distances.delete(address)
        this.#distances.set(address, peer.distance)
        if (this.#distances.size > distancesMax)
          this.#distances.delete(this.#distances.keys().next().value ?? address)
        const farInMs = this.#reach.heard(peer, this.#deps.monotonic())
        if (farInMs !== undefined) {
          // Timers are early by up to a millisecond.
          this.#farTimer = setTimeout(() => {
            this.#dialMore(this.#deps.monotonic())
          }, farInMs + 1).unref()
        }
        // Seeders are dialled by those who want something.
        if (this.#complete) continue
        const candidate = this.#candidates.get(address) ?? { peer, nextMs: 0, failures: 0, dialling: false }
        candidate.peer = peer
        this.#candidates.delete(address)
        this.#candidates.set(address, candidate)
        if (this.#candidates.size > candidatesMax) this.#forgetCandidate()
        if (this.#ready) this.#dialMore(this.#deps.monotonic())
      }
    } catch {
      // The source of peers broke; those that are known go on being used, and others may dial us.
    }
  }

  /** One that failed, else the one that is known for longest. */
  #forgetCandidate(): void {
    const failed = this.#failed.values().next().value
    const [oldest] = this.#candidates.keys()
    const address = failed ?? oldest
    if (address === undefined) return
    this.#candidates.delete(address)
    this.#failed.delete(address)
  }

  #dialMore(now: number): void {
    if (this.#complete || this.#closing || !this.#ready) return
    const connected = new Set<string>()
    for (const peer of this.#peers) {
      connected.add(peer.source)
      const port = peer.introduction?.port
      if (port !== undefined) connected.add(formatAddress(peer.link.ip, port))
    }
    // Connections that others made, and that may be of no use, are counted apart.
    const dialled = [...this.#peers].filter(({ link }) => !link.incoming).length
    const served = this.#admitted().some((peer) => peer.distance === 0 && this.#hasAll(peer))
    let far = reserveStep
    for (const [address, candidate] of this.#candidates) {
      if (this.#dialling >= dialsMax || dialled + this.#dialling >= this.#deps.config.connectionsMax) return
      if (candidate.dialling || candidate.nextMs > now || connected.has(address)) continue
      if (this.#suspects.isBanned(address)) continue
      if (!this.#reach.mayDial(candidate.peer, served, now)) continue
      if (candidate.peer.reserve && far-- <= 0) continue
      void this.#dial(address, candidate)
    }
  }

  async #dial(address: string, candidate: Candidate): Promise<void> {
    candidate.dialling = true
    this.#dialling++
    try {
      const { link, shaken } = await this.#deps.connect(candidate.peer, this.infoHash)
      candidate.failures = 0
      this.#failed.delete(address)
      candidate.nextMs = this.#deps.monotonic() + redialMs
      if (this.#complete || this.#closing) link.socket.destroy()
      else this.add(link, shaken, candidate.peer)
    } catch {
      candidate.nextMs = this.#deps.monotonic() + redialAfterMs(candidate.failures++)
      // Those that were never tried come first.
      if (this.#candidates.get(address) === candidate) {
        this.#candidates.delete(address)
        this.#candidates.set(address, candidate)
        this.#failed.add(address)
      }
    } finally {
      candidate.dialling = false
      this.#dialling--
      this.#dialMore(this.#deps.monotonic())
    }
  }

  /** Lets go of what does not move. */
  #watch(peer: Peer, now: number): void {
    if (peer.admittedUntilMs < Date.now()) {
      peer.close('its token has ended')
      return
    }
    if (this.#isOfUse(peer, now)) peer.usefulAtMs = now
    else if (now - peer.usefulAtMs > uselessMs) {
      peer.close('neither asks the other for anything')
      return
    }
    if (peer.asks.size === 0) return
    const stillMs = now - peer.movedAtMs
    const tooLittle = now - peer.openedAtMs > silentMs && peer.download.rate < blockBytes / 10
    if (stillMs > silentMs || (tooLittle && peer.download.total > 0 && this.#isStarved(peer, now))) {
      peer.close('it sends nothing')
      return
    }
    const { usualMs } = this.#turns.at(peer.distance).coming
    const { untouched } = this.#picker
    for (const ask of peer.asks)
      if (isLate(ask, { stillMs, usualMs, untouched, nowMs: now })) ask.dueMs = Infinity
  }

  /** One of the two wants something of the other, or may come to want it. */
  #isOfUse(peer: Peer, nowMs: number): boolean {
    if (peer.distance === 0 || peer.interesting || peer.interestedInUs || !this.#takesTurns(peer)) return true
    if (this.#isBegunWith(peer) || peer.owedBytes > 0) return true
    return !this.#complete && this.#reach.mayAsk(peer.distance, nowMs)
  }

  #isBegunWith({ asks, picking }: Peer): boolean {
    return asks.size > 0 || (picking !== undefined && this.#picker.isBegunWith(picking))
  }

  /** Its oldest request is older than any honest peer would let it become. */
  #isStarved(peer: Peer, now: number): boolean {
    const [oldest] = peer.asks
    return oldest !== undefined && now - oldest.askedMs > 2 * silentMs
  }

  #waitingFor(peer: Peer): string | undefined {
    if (peer.picking === undefined) return 'it has not shown yet that it may have this'
    if (this.#complete || peer.requestedBytes > 0) return undefined
    const now = this.#deps.monotonic()
    if (!this.#reach.mayAsk(peer.distance, now)) return 'it is far away, and this host is no gateway'
    if (!peer.interesting) return 'it has nothing that is missing'
    if (peer.choked) return 'it chokes us'
    if (this.#deps.limiter.waitMs('download', peer.distance) > 0) return 'the download limit'
    if (peer.distance > 0) return 'peers of the own rack have what is missing, or are fetching it'
    return 'all that it has is asked of others'
  }

  // Pieces.

  /** Asks all peers for what they are good for, first those that are asked for the least: so nobody's link stands idle while others queue. */
  #fill(): void {
    if (this.#complete || !this.#ready || this.#closing) return
    const { random } = this.#deps
    const order = this.#admitted()
      .filter((peer) => !peer.choked && peer.interesting)
      .map((peer) => ({ peer, asked: peer.requestedBytes + random() }))
      .sort((one, other) => one.asked - other.asked)
    while (order.filter(({ peer }) => this.#pump(peer)).length > 0);
  }

  /** Asks a peer for what was begun, and at most one more piece. @returns whether it was asked for another piece */
  #pump(peer: Peer): boolean {
    const { picking } = peer
    if (picking === undefined || this.#complete || !this.#ready || this.#closing) return false
    if (peer.choked || !peer.interesting || peer.closedWhy !== undefined) return false
    const now = this.#deps.monotonic()
    if (now < peer.askAgainMs) return false
    // What was begun with a far peer comes from there, whatever has become of this host's part in its rack.
    const begunOnly = !this.#reach.mayAsk(peer.distance, now)
    const { rate } = peer.download
    // Who has given nothing yet, or nothing of late, is taken to be as fast as the fastest of the others.
    const likelyRate = rate || this.#bestRate
    const ahead = aheadOf(likelyRate)
    const bytesMax = Math.min(peer.blockBytesMax, blockBytesOf(likelyRate))
    if (isAskedEnough(peer.requestedBytes, likelyRate)) return false
    const { coming } = this.#turns.at(peer.distance)
    const isBusyWith = peer.busyWith.size > 0 ? peer.isBusyWith(now) : undefined
    let begun: number | undefined
    while (peer.requestedBytes < ahead && peer.asks.size < peer.peerRequestsMax) {
      const waitMs = this.#deps.limiter.waitMs('download', peer.distance)
      if (waitMs > 0) {
        peer.timer ??= setTimeout(() => {
          peer.timer = undefined
          this.#pump(peer)
        }, waitMs)
        break
      }
      const mayBegin = !begunOnly && begun === undefined && coming.hasRoom(now)
      if (mayBegin) this.#spare ??= this.#diskFullSinceMs === undefined ? this.#takeMemory() : undefined
      const options: PickOptions = {
        peer: picking,
        bytesMax,
        mayBegin: mayBegin && this.#spare !== undefined,
        begunOnly,
        whole: this.#takesTurns(peer),
        anything: this.#reach.isStuck(now),
        refuses: isBusyWith,
        nowMs: now,
      }
      const ask = this.#picker.next(options) ?? (begunOnly ? undefined : this.#hedge(options, peer, now))
      if (ask === undefined) break
      if (!this.#memory.has(ask.piece)) {
        this.#giveMemoryTo(ask.piece)
        begun = ask.piece
        coming.begin(ask.piece, peer, now)
      }
      ask.askedMs = now
      ask.dueMs = now + dueInMs(peer.requestedBytes + ask.length, rate)
      this.#deps.limiter.take('download', peer.distance, ask.length)
      peer.ask(ask)
    }
    if (begun !== undefined) this.#tellClaims([begun], peer.distance)
    return begun !== undefined
  }

  /** Tells those who are nearer than the source what this host fetches, so that it comes to each rack, row and datacentre once. */
  #tellClaims(pieces: readonly number[], distance: number): void {
    if (distance === 0 || pieces.length === 0) return
    for (const piece of pieces) this.#claims.set(piece, distance)
    for (const neighbour of this.#toldOf(distance)) neighbour.claim(pieces)
  }

  #toldOf(distance: number): Peer[] {
    return [...this.#peers].filter((peer) => peer.distance < distance && !this.#showsAll(peer))
  }

  #claimAgain(nowMs: number): void {
    if (nowMs - this.#claimedAtMs < claimAgainMs) return
    this.#claimedAtMs = nowMs
    const pieces = Map.groupBy(this.#claims, ([, distance]) => distance)
    for (const [distance, claims] of pieces)
      this.#tellClaims(
        claims.map(([piece]) => piece).filter((piece) => this.#picker.isAsked(piece)),
        distance,
      )
  }

  /** At the end, and of what is late, also what others were asked for. */
  #hedge(options: PickOptions, peer: Peer, now: number): Ask | undefined {
    const { rate } = peer.download
    const readyMs = now + hedgeInMs(peer.requestedBytes + options.bytesMax, rate, this.#picker.untouched)
    return this.#picker.hedge(options, readyMs)
  }

  #takeMemory(): Uint8Array | undefined {
    return this.#deps.store.takeMemory(this.metainfo.pieceLength, this.#memory.size)
  }

  #giveMemoryTo(piece: number): void {
    const memory = this.#spare ?? this.#takeMemory()
    this.#spare = undefined
    if (memory) this.#memory.set(piece, memory)
  }

  /** What is being written is freed after that: another piece would put its bytes there, and they would be written. */
  #freeMemory(piece: number): void {
    const memory = this.#memory.get(piece)
    if (memory === undefined || this.#writing.has(piece)) return
    this.#memory.delete(piece)
    this.#deps.store.giveMemory(memory)
  }

  #release(ask: Ask, peer: Peer): void {
    this.#picker.release(ask)
    this.#deps.limiter.give('download', peer.distance, ask.length)
  }

  /** Checks a piece that has come whole, and writes it. */
  async #finishPiece(piece: number): Promise<void> {
    const memory = this.#memory.get(piece)
    if (memory === undefined) return
    this.#writing.add(piece)
    const right = await this.#write(piece, memory.subarray(0, this.pieceSize(piece)))
    this.#writing.delete(piece)
    this.#freeMemory(piece)
    if (right === undefined) return
    if (right) this.#verified(piece)
    else this.#wrong(piece)
    this.#fill()
  }

  /** Waits where the disk is full. @returns undefined where the fetch has ended meanwhile */
  async #write(piece: number, bytes: Uint8Array): Promise<boolean | undefined> {
    for (;;) {
      try {
        const right = await this.#writer.write(
          piece * this.metainfo.pieceLength,
          bytes,
          this.#sha1s[piece] ?? '',
        )
        this.#diskFullSinceMs = undefined
        return this.#isOver() ? undefined : right
      } catch (error) {
        if (this.#isOver()) return undefined
        const now = this.#deps.monotonic()
        const full = errorCode(error) === 'ENOSPC' || errorCode(error) === 'EDQUOT'
        if (full) this.#diskFullSinceMs ??= now
        if (!full || now - (this.#diskFullSinceMs ?? now) > diskFullMs) {
          this.#fail(error as Error)
          return undefined
        }
        await new Promise((resolve) => setTimeout(resolve, diskRetryMs))
      }
    }
  }

  #isOver(): boolean {
    return this.#closing !== undefined
  }

  #verified(piece: number): void {
    this.#picker.done(piece)
    if (this.#have[piece] === 1) return
    this.#seedFile.forget(piece * this.metainfo.pieceLength, this.pieceSize(piece))
    this.#have[piece] = 1
    this.#claims.delete(piece)
    this.#bytesVerified += this.pieceSize(piece)
    this.#suspects.verified(piece)
    for (const peer of this.#peers) {
      const { picking } = peer
      // Who has everything does not look for pieces, nor one of ours for what it has; the only seed counts what its peers have.
      if (picking === undefined || this.#showsAll(peer)) continue
      if (this.#picker.has(picking, piece) && peer.knowsOwnPieces) continue
      peer.tellHave(piece)
    }
    this.#listener?.(piece)
    if (this.#bytesVerified === this.metainfo.length) void this.#finish()
  }

  #wrong(piece: number): void {
    this.#forget(piece)
    const senders = new Set(this.#suspects.failed(piece))
    for (const peer of [...this.#peers]) if (senders.has(peer.sender)) peer.close('it sent wrong bytes')
  }

  async #finish(): Promise<void> {
    this.#complete = true
    clearTimeout(this.#fillTimer)
    this.#endWebseed()
    this.#candidates.clear()
    this.#failed.clear()
    this.#signal.removeEventListener('abort', this.#onAbort)
    this.#freeSpare()
    this.#writer.close()
    // The file is about to be renamed.
    await this.#seedFile.hold().catch(() => undefined)
    this.#outcome.resolve(undefined)
    for (const peer of [...this.#peers]) {
      peer.setInteresting(false)
      // It was not told of every piece.
      if (peer.picking && peer.knowsOwnPieces && peer.handshake.fast) peer.send(writeSimple(messages.haveAll))
      this.#partFrom(peer)
    }
  }

  #freeSpare(): void {
    if (this.#spare) this.#deps.store.giveMemory(this.#spare)
    this.#spare = undefined
  }

  #fail(error: Error): void {
    this.#outcome.reject(error)
    void this.close()
  }

  async #close(): Promise<void> {
    this.#outcome.reject(new Error('the torrent was closed'))
    clearTimeout(this.#fillTimer)
    clearTimeout(this.#farTimer)
    this.#signal.removeEventListener('abort', this.#onAbort)
    this.#endWebseed()
    for (const peer of [...this.#peers]) peer.close('the torrent was closed')
    this.#freeSpare()
    for (const piece of [...this.#memory.keys()]) this.#freeMemory(piece)
    this.#writer.close()
    await this.#seedFile.close()
    this.#deps.closed()
  }

  /** What an earlier run left is checked, not trusted. */
  async #checkPart(): Promise<void> {
    this.#writer.prepare()
    try {
      const size = await stat(this.#file).then(
        (stats) => stats.size,
        (error: unknown) => {
          if (errorCode(error) === 'ENOENT') return 0
          throw error
        },
      )
      const pieces = Math.min(this.pieceCount, Math.ceil(size / this.metainfo.pieceLength))
      let next = 0
      const check = async () => {
        while (next < pieces && !this.#isOver()) {
          const piece = next++
          const position = piece * this.metainfo.pieceLength
          const right = await this.#writer.check(position, this.pieceSize(piece), this.#sha1s[piece] ?? '')
          if (right && !this.#isOver()) this.#verified(piece)
        }
      }
      await Promise.all(Array.from({ length: checksMax }, check))
    } catch (error) {
      if (!this.#isOver()) this.#fail(error as Error)
      return
    }
    if (this.#isOver()) return
    this.#ready = true
    this.#movedAtMs = this.#deps.monotonic()
    this.#startWebseed()
    for (const peer of this.#peers) this.#review(peer)
    this.tick()
  }

  // The webseed.

  #endWebseed(): void {
    this.#webseedRun = undefined
    this.#webseedEnd.abort()
  }

  /** Where there was another webseed, or may be none any more, what was asked of it still comes. */
  #startWebseed(): void {
    const url = this.#webseed?.url ?? (this.#owesRanges() ? this.#webseedRun?.url : undefined)
    if (url === this.#webseedRun?.url || this.#complete || this.#closing || !this.#ready) return
    const run = url === undefined ? undefined : { url }
    this.#webseedRun = run
    if (run === undefined) return
    void runWebseed(
      run.url,
      this.#webseedLanes,
      {
        isWanted: () => this.#webseedRun === run,
        claim: (maxBytes) => this.#claim(maxBytes),
        pieceSize: (piece) => this.pieceSize(piece),
        // Shared, so that the thread which checks and writes it needs no copy.
        takeMemory: () =>
          this.#deps.store.takeMemory(this.metainfo.pieceLength, 0) ??
          new Uint8Array(this.metainfo.pieceLength),
        giveMemory: (memory) => {
          this.#deps.store.giveMemory(memory)
        },
        received: (bytes) => {
          this.#bytesReceived += bytes
          this.#past.add('webseed', 'webseed', undefined, bytes, 0)
          // Peers share with it what the host may receive.
          this.#deps.limiter.take('download', 0, bytes)
        },
        monotonic: this.#deps.monotonic,
        random: this.#deps.random,
        dispatcher: this.#deps.dispatcher,
      },
      this.#webseedEnd.signal,
    )
  }

  /** Whether a piece is missing of the ranges that it is done with. */
  #owesRanges(): boolean {
    for (const { firstPiece, pieceCount: count } of this.#owedRanges.values())
      if (!this.#have.subarray(firstPiece, firstPiece + count).includes(0))
        this.#owedRanges.delete(firstPiece)
    return this.#owedRanges.size > 0
  }

  #untouchedRun(
    piecesMax: number,
    nowMs: number,
  ): { readonly first: number; readonly count: number } | undefined {
    const anything = nowMs - this.#givenAtMs > webseedAfterMs
    const owed = this.#owesRanges() ? [...this.#owedRanges.values()] : []
    // Of what a peer had sent a part before it went: nobody else would go on with it.
    for (const piece of this.#picker.stranded()) this.#dropBegun(piece)
    for (const range of this.#webseed ? [...owed, this.#webseed.range] : owed) {
      const run = this.#picker.untouchedRun({ within: range, piecesMax, anything, nowMs })
      if (run) return run
    }
    return undefined
  }

  /** A run of pieces that nobody was asked for: those that no peer has, or where nothing moves any. */
  #claim(bytesMax: number): Claim | undefined {
    if (this.#closing || this.#complete || this.#diskFullSinceMs !== undefined) return undefined
    const nowMs = this.#deps.monotonic()
    const run = this.#untouchedRun(Math.max(1, Math.floor(bytesMax / this.metainfo.pieceLength)), nowMs)
    if (run === undefined) {
      if (this.#webseed === undefined) {
        this.#startWebseed()
      } else if (!this.#isRangeDone) {
        this.#isRangeDone = true
        const { range, rangeDone } = this.#webseed
        if (range) this.#owedRanges.set(range.firstPiece, range)
        rangeDone?.()
      }
      return undefined
    }
    const asks = new Map<number, Ask>()
    for (let piece = run.first; piece < run.first + run.count; piece++)
      asks.set(piece, this.#picker.takeWhole(piece, nowMs))
    this.#tellClaims([...asks.keys()], distanceUnknown)
    return {
      first: run.first,
      count: run.count,
      start: run.first * this.metainfo.pieceLength,
      end: Math.min((run.first + run.count) * this.metainfo.pieceLength, this.metainfo.length),
      accept: async (piece, bytes) => {
        const ask = asks.get(piece)
        if (this.#closing || ask === undefined || this.#have[piece] === 1) return true
        const right = await this.#write(piece, bytes)
        if (right !== true) return right === undefined
        asks.delete(piece)
        this.#take(ask)
        this.#freeMemory(piece)
        this.#verified(piece)
        return true
      },
      release: () => {
        for (const ask of asks.values()) {
          this.#picker.release(ask)
          if (!this.#memory.has(ask.piece)) this.#forget(ask.piece)
        }
        if (!this.#closing) this.#fill()
      },
    }
  }
}

function addTo(sums: TrafficSums, { source, placeName, download, upload }: Peer): void {
  sums.add(source, 'peer', placeName, download.total, upload.total)
}

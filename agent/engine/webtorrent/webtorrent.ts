import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { networkInterfaces } from 'node:os'
import { Agent } from 'undici'
import type { Dispatcher } from 'undici'
import type { Torrent, Wire } from 'webtorrent'
import WebTorrent from 'webtorrent'
import {
  endpointIp,
  endpointPort,
  formatAddress,
  formatEndpoint,
  formatIp,
  socketAddress,
} from '../../../lib/protocol/address.ts'
import { distanceUnknown } from '../../../lib/protocol/announce.ts'
import type { Metainfo } from '../../../lib/protocol/metainfo.ts'
import { pieceCount, pieceHashes, pieceSize } from '../../../lib/protocol/metainfo.ts'
import type {
  Engine,
  EngineConfig,
  EngineHandle,
  EnginePeer,
  FetchOptions,
  Limits,
  PeerAdmission,
  PeerState,
  SeedOptions,
  Webseed,
} from '../engine.ts'
import { PieceFile } from './piece-file.ts'
import { createPiecePicker } from './piece-picker.ts'
import { createSuspects } from '../suspects.ts'
import { TrafficSums } from '../traffic.ts'
import type { Claim } from '../webseed-source.ts'
import { createWebseedLanes, runWebseed } from '../webseed-source.ts'
import { guardWires, holdBack, letThrough, requestsMax } from './wire-guard.ts'

export interface WebtorrentDeps {
  /** Milliseconds since some start; it never goes back. */
  monotonic: () => number
  random: () => number
  /** Speaks HTTP to the webseed. */
  dispatcher?: Dispatcher
}

/** Nothing near moved for this long: far peers held in reserve are dialled, a few at a time. */
const reserveAfterMs = 3000
const reserveStep = 4
/** Having stood still, a host that is no gateway may ask far peers for this long. */
const farGraceMs = 15_000
/** Peers held in reserve; a tracker's reply has at most 100. */
const reserveMax = 200
/** A near peer has connected and said what it has by then; a gateway without one loses no more than this. */
const nearFirstMs = 100
/** A peer that answers no request for this long is let go; webtorrent's own 30 s would be most of a deploy. */
const requestTimeoutMs = 10_000
const tickMs = 1000
/** BEP 3: what one request asks for. */
const blockSize = 16 * 1024
/** webtorrent itself allows two requests to a peer that has sent nothing yet. */
const pipelineMin = 2
/** Open sockets of all torrents together. */
const socketsMax = 2000
/** Datacentre hosts do not trade tit for tat: as many are served as may connect. */
const uploadSlots = 50
/** Who has not shown by then that it may take part is let go. */
const admissionMs = 5000

/** The Engine on webtorrent 3: TCP only, no tracker, no DHT, no encryption. */
export async function createWebtorrentEngine(config: EngineConfig, deps: WebtorrentDeps): Promise<Engine> {
  guardWires()
  const client = new WebTorrent({
    peerId: Buffer.concat([Buffer.from('-RS0100-'), randomBytes(12)]).toString('hex'),
    torrentPort: config.port,
    maxConns: config.connectionsMax,
    tracker: false,
    dht: false,
    lsd: false,
    natUpnp: false,
    natPmp: false,
    utp: false,
    utPex: false,
    webSeeds: false,
    secure: 0,
  })
  await once(client, 'listening')
  // Errors of torrents come to their own handlers; what is left here breaks nothing that is not noticed elsewhere.
  client.on('error', () => undefined)
  if (client._connPool) client._connPool.tcpServer.maxConnections = socketsMax
  const dispatcher = deps.dispatcher ?? new Agent({ connections: 4 })
  const handles = new Set<WebtorrentHandle>()
  let limits = config.limits
  const setLimits = (wanted: Limits) => {
    limits = wanted
    client.throttleDownload(wanted.downloadBytesPerSecond ?? -1)
    client.throttleUpload(wanted.uploadBytesPerSecond ?? -1)
  }
  setLimits(limits)
  const ticker = setInterval(() => {
    for (const handle of handles) handle.tick()
  }, tickMs)
  ticker.unref()

  const add = (options: FetchOptions | SeedOptions, kind: 'fetch' | 'seed'): EngineHandle => {
    for (const other of handles) {
      if (other.infoHash === options.metainfo.infoHash)
        throw new Error(`Cannot add torrent ${options.metainfo.infoHash}: it is there already`)
    }
    options.signal.throwIfAborted()
    const handle: WebtorrentHandle = new WebtorrentHandle(client, options, kind, {
      ...deps,
      dispatcher,
      identity: config.identity,
      peerTokens: config.peerTokens,
      admission: config.admission,
      peerBanned: (address, infoHash) => {
        config.peerBanned?.(address, infoHash)
      },
      connectionsMax: config.connectionsMax,
      rate: () => limits.downloadBytesPerSecond,
      closed: () => {
        handles.delete(handle)
      },
    })
    handles.add(handle)
    return handle
  }
  return {
    name: 'webtorrent',
    port: client.torrentPort,
    peerId: Buffer.from(client.peerId, 'hex'),
    fetch: (options) => add(options, 'fetch'),
    seed: (options) => add(options, 'seed'),
    setLimits,
    [Symbol.asyncDispose]: async () => {
      clearInterval(ticker)
      await Promise.all([...handles].map((handle) => handle.close()))
      if (!client.destroyed) {
        await new Promise<void>((resolve) => {
          client.destroy(() => {
            resolve()
          })
        })
      }
      if (deps.dispatcher === undefined) await dispatcher.destroy()
    },
  }
}

interface HandleDeps extends WebtorrentDeps {
  dispatcher: Dispatcher
  identity: EngineConfig['identity']
  peerTokens: EngineConfig['peerTokens']
  admission: EngineConfig['admission']
  connectionsMax: number
  peerBanned: NonNullable<EngineConfig['peerBanned']>
  rate: () => number | undefined
  closed: () => void
}

class WebtorrentHandle implements EngineHandle {
  readonly infoHash: string
  readonly done: Promise<void>
  readonly #client: WebTorrent
  readonly #deps: HandleDeps
  readonly #metainfo: Metainfo
  readonly #torrent: Torrent
  readonly #have: Uint8Array
  readonly #outcome = Promise.withResolvers<undefined>()
  readonly #suspects
  readonly #closedWires = new TrafficSums()
  readonly #reserve = new Map<string, EnginePeer>()
  /** Addresses of peers of the own rack. */
  readonly #near = new Set<string>()
  /** Far peers for a gateway, until it is known whether a near peer has everything. */
  readonly #far: EnginePeer[] = []
  /** What the tracker last said: far peers are to be used now, not held in reserve. */
  #gateway = true
  #farUntil = 0
  readonly #signal: AbortSignal
  readonly #onAbort: () => void
  readonly #claimed = new Set<number>()
  #bytesVerified = 0
  #listener: ((piece: number) => void) | undefined
  #webseed: Webseed | undefined
  /** Ends its requests. */
  #webseedRun: AbortController | undefined
  #isRangeDone = false
  #bytesSeen = 0
  #movedAt: number
  #complete: boolean
  #closing: Promise<void> | undefined

  constructor(
    client: WebTorrent,
    options: FetchOptions | SeedOptions,
    kind: 'fetch' | 'seed',
    deps: HandleDeps,
  ) {
    const { metainfo } = options
    this.infoHash = metainfo.infoHash
    this.#client = client
    this.#deps = deps
    this.#metainfo = metainfo
    this.#suspects = createSuspects(deps.monotonic, (address) => {
      deps.peerBanned(address, metainfo.infoHash)
    })
    this.#movedAt = deps.monotonic()
    this.#complete = kind === 'seed'
    this.#have = new Uint8Array(pieceCount(metainfo)).fill(kind === 'seed' ? 1 : 0)
    if (kind === 'seed') this.#bytesVerified = metainfo.length
    this.#signal = options.signal
    this.done = this.#outcome.promise.then(() => undefined)
    // Who does not wait for it must not be killed by it.
    this.done.catch(() => undefined)
    this.#torrent = client.add(parsedTorrent(metainfo), {
      preloadedStore: new PieceFile(
        options.file,
        metainfo.length,
        metainfo.pieceLength,
        kind === 'seed' ? 'read' : 'write',
      ),
      storeCacheSlots: 0,
      skipVerify: kind === 'seed',
      strategy: 'sequential',
      private: true,
      uploads: uploadSlots,
    })
    if (kind === 'fetch') this.#pickPieces()
    this.#attach()
    this.#onAbort = () => {
      this.#end(
        this.#signal.reason instanceof Error ? this.#signal.reason : new Error('the fetch was aborted'),
      )
      void this.close()
    }
    this.#signal.addEventListener('abort', this.#onAbort, { once: true })
    if (kind === 'seed') this.#outcome.resolve(undefined)
    else if ('webseed' in options) this.setWebseed(options.webseed)
    void this.#takePeers(options.peers)
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
    return this.#closing ? 0 : this.#torrent.wires.length
  }

  get waitingReason(): string | undefined {
    if (this.#complete || this.#deps.monotonic() - this.#movedAt < 2 * tickMs) return undefined
    if (this.#closing) return 'closed'
    if (!this.#torrent.ready) return 'the part on disk is being checked'
    const { wires } = this.#torrent
    const webseed = this.#webseedRun ? '; the webseed gives nothing either' : ''
    if (wires.length === 0) return `no peer answers${webseed}`
    if (wires.every((wire) => !wire.amInterested))
      return `none of ${wires.length} peers has a piece that is missing${webseed}`
    if (wires.every((wire) => wire.peerChoking)) return `all of ${wires.length} peers are choking${webseed}`
    return `${wires.length} peers send nothing${webseed}`
  }

  traffic() {
    const sums = this.#closedWires.copy()
    if (!this.#closing) for (const wire of this.#torrent.wires) addWire(sums, wire)
    return sums.list()
  }

  peers(): PeerState[] {
    if (this.#closing) return []
    return this.#torrent.wires.map((wire) => ({
      source: sourceOf(wire) ?? 'other',
      host: undefined,
      place: placeOf(wire),
      distance: this.#isNear(wire) ? 0 : distanceUnknown,
      incoming: wire.type !== 'tcpOutgoing',
      downloadRate: wire.downloadSpeed(),
      uploadRate: wire.uploadSpeed(),
      requestedBytes: wire.requests.length * blockSize,
      owedBytes: wire.peerRequests.length * blockSize,
      progress: wire.isSeeder === true ? 1 : 0,
      waiting: wire.peerChoking ? 'it chokes us' : undefined,
    }))
  }

  setWebseed(webseed: Webseed | undefined): void {
    const isRunning =
      webseed !== undefined && webseed.url === this.#webseed?.url && this.#webseedRun !== undefined
    this.#webseed = webseed
    this.#isRangeDone = false
    if (isRunning) return
    this.#webseedRun?.abort()
    this.#webseedRun = undefined
    if (webseed === undefined || this.#complete || this.#closing) return
    const { url } = webseed
    const controller = new AbortController()
    this.#webseedRun = controller
    void runWebseed(
      url,
      createWebseedLanes(this.#deps.rate, this.#deps.monotonic),
      {
        isWanted: () => true,
        claim: (maxBytes) => this.#claim(maxBytes),
        pieceSize: (piece) => pieceSize(this.#metainfo, piece),
        // Its store may keep what it was given.
        takeMemory: () => new Uint8Array(this.#metainfo.pieceLength),
        giveMemory: () => undefined,
        received: (bytes) => {
          this.#closedWires.add('webseed', 'webseed', undefined, bytes, 0)
        },
        monotonic: this.#deps.monotonic,
        random: this.#deps.random,
        dispatcher: this.#deps.dispatcher,
      },
      controller.signal,
    )
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  /** Once a second: far peers when nothing moves, and a nudge, since webtorrent asks for more only when something happens. */
  tick(): void {
    if (this.#complete || this.#closing || !this.#torrent.ready) return
    const seen = this.traffic().reduce((sum, { downloadedBytes }) => sum + downloadedBytes, 0)
    const now = this.#deps.monotonic()
    if (seen > this.#bytesSeen) {
      this.#bytesSeen = seen
      this.#movedAt = now
    } else if (now - this.#movedAt >= reserveAfterMs) {
      this.#farUntil = now + farGraceMs
      let left = reserveStep
      for (const [address, peer] of this.#reserve) {
        if (left-- === 0) break
        this.#reserve.delete(address)
        this.#dial(peer)
      }
    }
    this.#torrent._update()
  }

  async #close(): Promise<void> {
    this.#end(new Error('the torrent was closed'))
    this.#signal.removeEventListener('abort', this.#onAbort)
    this.#webseedRun?.abort()
    this.#webseedRun = undefined
    for (const wire of this.#torrent.wires) addWire(this.#closedWires, wire)
    if (!this.#torrent.destroyed) {
      await new Promise<void>((resolve) => {
        this.#torrent.destroy({ destroyStore: false }, resolve)
      })
    }
    this.#deps.closed()
  }

  /**
   * Our own choice of blocks in the place of webtorrent's, which looks at every piece, also those it has, for every
   * block: four fifths of the CPU of a fetch.
   */
  #pickPieces(): void {
    const torrent = this.#torrent
    const picker = createPiecePicker(pieceCount(this.#metainfo), this.#deps.random)
    torrent._updateWire = (wire) => {
      if (!torrent.ready || wire.destroyed || wire.peerChoking || this.#complete) return
      const pipeline = pipelineOf(wire)
      if (wire.requests.length >= pipeline / 2) return
      const hasPiece = this.#mayAsk(wire)
      if (hasPiece === undefined) return
      while (wire.requests.length < pipeline) {
        const piece = picker.next(torrent.pieces, torrent._rarityMap._pieces, hasPiece)
        if (piece === undefined) {
          if (wire.requests.length === 0)
            picker.unfinished(torrent.pieces, hasPiece).some((slow) => torrent._request(wire, slow, true))
          return
        }
        if (!torrent._request(wire, piece, false)) return
        while (wire.requests.length < pipeline && torrent._request(wire, piece, false));
      }
    }
  }

  /**
   * Which pieces a peer may be asked for. A far peer gives what no near peer can, and that to gateways, who pass it on
   * in their rack; a rack that stands still asks anyone.
   */
  #mayAsk(wire: Wire): ((piece: number) => boolean) | undefined {
    const hasPiece = (piece: number) => wire.peerPieces.get(piece)
    if (this.#deps.monotonic() < this.#farUntil || this.#isNear(wire)) return hasPiece
    if (!this.#gateway) return undefined
    const near = this.#torrent.wires.filter((other) => !other.peerChoking && this.#isNear(other))
    return (piece) => hasPiece(piece) && !near.some((other) => other.peerPieces.get(piece))
  }

  #end(error: Error): void {
    this.#outcome.reject(error)
  }

  #attach(): void {
    const torrent = this.#torrent
    torrent.on('verified', (piece: number) => {
      if (this.#closing || this.#have[piece] === 1) return
      this.#have[piece] = 1
      this.#bytesVerified += pieceSize(this.#metainfo, piece)
      this.#suspects.verified(piece)
      this.#listener?.(piece)
    })
    torrent.on('done', () => {
      this.#complete = true
      this.#reserve.clear()
      // The signal was for the fetch; what it became is ended by close().
      this.#signal.removeEventListener('abort', this.#onAbort)
      this.setWebseed(undefined)
      this.#outcome.resolve(undefined)
    })
    torrent.on('warning', (warning: Error) => {
      const failed = /^Piece (\d+) failed verification/.exec(warning.message)
      if (!failed) return
      const senders = new Set(this.#suspects.failed(Number(failed[1])))
      for (const wire of [...torrent.wires]) if (senders.has(senderOf(wire))) wire.destroy()
    })
    torrent.on('error', (error: Error) => {
      this.#end(error)
      void this.close()
    })
    torrent.on('wire', (wire: Wire) => {
      this.#onWire(wire)
    })
  }

  #onWire(wire: Wire): void {
    wire.on('error', () => undefined)
    const sender = senderOf(wire)
    if (
      wire.peerId === this.#client.peerId ||
      this.#suspects.isBanned(sender) ||
      // webtorrent bounds only the connections it makes itself.
      this.#torrent.wires.length > 2 * this.#deps.connectionsMax ||
      this.#isSurplus(wire)
    ) {
      wire.destroy()
      return
    }
    const { host, place } = this.#deps.identity
    // Only agents are told anything of us, and they are known by their peer id.
    const token = isAgent(wire) ? this.#deps.peerTokens?.tokenFor(this.#metainfo.infoHash) : undefined
    wire.extendedHandshake['rs'] = {
      host,
      ...(place === undefined ? {} : { place }),
      ...(token === undefined ? {} : { token }),
    }
    if (this.#deps.admission) this.#awaitToken(wire, this.#deps.admission)
    wire.extendedHandshake['p'] = this.#client.torrentPort
    wire.extendedHandshake['reqq'] = requestsMax
    wire.setTimeout(requestTimeoutMs, true)
    if (!this.#complete) {
      wire.on('piece', (piece: number) => {
        if (!this.#complete) this.#suspects.received(piece, sender)
      })
    }
    wire.once('close', () => {
      if (!this.#closing) addWire(this.#closedWires, wire)
    })
  }

  /** Gives nothing, and lets go soon, until the peer has shown that it may take part. */
  #awaitToken(wire: Wire, admission: PeerAdmission): void {
    const { infoHash } = this.#metainfo
    holdBack(wire)
    const timer = setTimeout(() => {
      wire.destroy()
    }, admissionMs)
    wire.once('close', () => {
      clearTimeout(timer)
    })
    wire.once('extended', (name: string) => {
      const ip = socketAddress(wire.remoteAddress)
      const token = tokenOf(wire)
      if (name !== 'handshake' || ip === undefined || token === undefined) {
        wire.destroy()
        return
      }
      void admission.admit(token, infoHash, { ip, thumbprint: undefined }).then((admitted) => {
        clearTimeout(timer)
        if (admitted === undefined) wire.destroy()
        else {
          letThrough(wire)
          const endMs = Math.min(Math.max(0, admitted.untilMs - Date.now()), 2 ** 31 - 1)
          const end = setTimeout(() => {
            wire.destroy()
          }, endMs)
          end.unref()
          wire.once('close', () => {
            clearTimeout(end)
          })
        }
      })
    })
  }

  /** Two hosts that dial each other keep the connection that the smaller peer id made: both ends decide alike. */
  #isSurplus(wire: Wire): boolean {
    const twin = this.#torrent.wires.find(
      (other) => other !== wire && other.peerId === wire.peerId && !other.destroyed,
    )
    if (twin === undefined) return false
    const ourDialWins = this.#client.peerId < wire.peerId
    const wireWins = ourDialWins === (wire.type === 'tcpOutgoing')
    const twinWins = ourDialWins === (twin.type === 'tcpOutgoing')
    // Two of the same direction: the old one may be half open, the new one has just spoken.
    if (wireWins && !twinWins) twin.destroy()
    else if (wireWins === twinWins) twin.destroy()
    else return true
    return false
  }

  async #takePeers(peers: AsyncIterable<EnginePeer>): Promise<void> {
    try {
      for await (const peer of peers) {
        if (this.#closing) return
        // Seeders are dialled by those who want something.
        if (this.#complete) continue
        if (peer.distance === 0) this.#near.add(formatEndpoint(peer.endpoint))
        else this.#gateway = !peer.reserve
        if (peer.distance > 0 && !peer.reserve && this.#near.size > 0) this.#dialUnlessServed(peer)
        else if (!peer.reserve) this.#dial(peer)
        else if (this.#reserve.size < reserveMax) this.#reserve.set(formatEndpoint(peer.endpoint), peer)
      }
    } catch {
      // The source of peers broke; those that are known go on being used, and others may dial us.
    }
  }

  /** A gateway needs far peers at once, unless its rack holds the blob already: what is near is asked first. */
  #dialUnlessServed(peer: EnginePeer): void {
    this.#far.push(peer)
    if (this.#far.length > 1) return
    setTimeout(() => {
      const served = this.#torrent.wires.some((wire) => wire.isSeeder === true && this.#isNear(wire))
      for (const far of this.#far.splice(0)) {
        if (served && this.#reserve.size < reserveMax) this.#reserve.set(formatEndpoint(far.endpoint), far)
        else this.#dial(far)
      }
    }, nearFirstMs).unref()
  }

  #isNear(wire: Wire): boolean {
    const { place } = this.#deps.identity
    return this.#near.has(senderOf(wire)) || (place !== undefined && placeOf(wire) === place)
  }

  #dial({ endpoint }: EnginePeer): void {
    const torrent = this.#torrent
    if (this.#closing || this.#complete || torrent.destroyed) return
    const ip = formatIp(endpointIp(endpoint))
    const port = endpointPort(endpoint)
    const address = formatEndpoint(endpoint)
    if (port === this.#client.torrentPort && isOwnAddress(ip)) return
    if (this.#suspects.isBanned(address)) return
    if (
      torrent.wires.some(
        (wire) =>
          bareAddress(wire) === ip &&
          (wire.remotePort === port || wire.peerExtendedHandshake?.['p'] === port),
      )
    )
      return
    torrent.addPeer(address)
  }

  /** A run of missing pieces, from a random start, of which no peer was asked for a block; at the end any missing one. */
  #claim(maxBytes: number): Claim | undefined {
    const torrent = this.#torrent
    if (this.#closing || this.#complete || !torrent.ready || torrent.destroyed) return undefined
    const range = this.#webseed?.range
    const from = range?.firstPiece ?? 0
    const count = Math.max(0, Math.min(this.#have.length - from, range?.pieceCount ?? this.#have.length))
    const start = range ? 0 : Math.floor(this.#deps.random() * count)
    const isFree = (piece: number) =>
      torrent.pieces[piece] != null &&
      !this.#claimed.has(piece) &&
      !torrent._reservations[piece]?.some((wire) => wire !== null)
    const isMissing = (piece: number) => torrent.pieces[piece] != null && !this.#claimed.has(piece)
    for (const wanted of [isFree, isMissing]) {
      if (wanted === isMissing && !this.#isRangeDone) {
        this.#isRangeDone = true
        this.#webseed?.rangeDone?.()
      }
      // Pieces that peers were asked for are taken only when these send nothing.
      if (wanted === isMissing && this.#deps.monotonic() - this.#movedAt < 2 * tickMs) return undefined
      for (let i = 0; i < count; i++) {
        const first = from + ((start + i) % count)
        if (!wanted(first)) continue
        let last = first
        for (
          let bytes = pieceSize(this.#metainfo, first);
          last + 1 < from + count && wanted(last + 1);
          last++
        ) {
          bytes += pieceSize(this.#metainfo, last + 1)
          if (bytes > maxBytes) break
        }
        return this.#claimRun(first, last)
      }
    }
    return undefined
  }

  #claimRun(first: number, last: number): Claim {
    const torrent = this.#torrent
    const reserved = new Map<
      number,
      { piece: NonNullable<(typeof torrent.pieces)[number]>; reservation: number }
    >()
    for (let index = first; index <= last; index++) {
      this.#claimed.add(index)
      const piece = torrent.pieces[index]
      const reservation = piece?.reserveRemaining() ?? -1
      if (piece && reservation >= 0) reserved.set(index, { piece, reservation })
    }
    const start = first * this.#metainfo.pieceLength
    return {
      first,
      count: last - first + 1,
      start,
      end: Math.min((last + 1) * this.#metainfo.pieceLength, this.#metainfo.length),
      accept: async (index, bytes) => {
        if (!(await this.#store(index, bytes))) return false
        reserved.delete(index)
        return true
      },
      release: () => {
        for (let index = first; index <= last; index++) this.#claimed.delete(index)
        for (const { piece, reservation } of reserved.values()) piece.cancelRemaining(reservation)
        if (!torrent.destroyed) torrent._update()
      },
    }
  }

  /** Does for a webseed's piece what webtorrent does for a peer's: check, write, mark, tell. */
  async #store(index: number, bytes: Uint8Array): Promise<boolean> {
    const torrent = this.#torrent
    if (torrent.destroyed || torrent.store === null) throw new Error('the torrent is closed')
    if (torrent.pieces[index] == null) return true
    if (createHash('sha1').update(bytes).digest('hex') !== torrent._hashes[index]) return false
    const { store } = torrent
    await new Promise<void>((resolve, reject) => {
      store.put(index, bytes, (error) => {
        if (error) reject(error)
        else resolve()
      })
    }).catch((error: unknown) => {
      // A disk that takes no more ends the fetch, as it does for pieces of peers.
      torrent._destroy(error as Error)
      throw error
    })
    // A peer may have brought the piece meanwhile.
    if (this.#isGone() || this.has(index)) return true
    torrent._markVerified(index)
    for (const wire of torrent.wires) wire.have(index)
    torrent._checkDone()
    torrent._update()
    return true
  }

  #isGone(): boolean {
    return this.#closing !== undefined || this.#torrent.destroyed
  }
}

/** Blocks in flight to a peer: what it sends in a second at its present rate, within what it says it takes. */
function pipelineOf(wire: Wire): number {
  const wanted = Math.max(pipelineMin, Math.ceil(wire.downloadSpeed() / blockSize))
  const reqq = wire.peerExtendedHandshake?.['reqq']
  return typeof reqq === 'number' && reqq > 0 ? Math.min(wanted, reqq) : wanted
}

function addWire(sums: TrafficSums, wire: Wire): void {
  sums.add(sourceOf(wire) ?? 'other', 'peer', placeOf(wire), wire.downloaded, wire.uploaded)
}

/** A stranger's words: read strictly, used for statistics only. */
function placeOf(wire: Wire): string | undefined {
  return wordOf(wire, 'place', /^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$/)
}

function tokenOf(wire: Wire): string | undefined {
  return wordOf(wire, 'token', /^[\w.-]{1,4096}$/)
}

/** A member of the `rs` dictionary. */
function wordOf(wire: Wire, member: string, form: RegExp): string | undefined {
  const rs = wire.peerExtendedHandshake?.['rs']
  const word = typeof rs === 'object' && rs !== null ? (rs as Record<string, unknown>)[member] : undefined
  if (!(word instanceof Uint8Array)) return undefined
  const text = Buffer.from(word.buffer, word.byteOffset, word.length).toString('latin1')
  return form.test(text) ? text : undefined
}

/** `-RS`, in hex. */
function isAgent(wire: Wire): boolean {
  return wire.peerId.startsWith('2d5253')
}

/** What a ban holds on to: the address dialled; for an incoming connection, whose port means nothing, address and peer id. */
function senderOf(wire: Wire): string {
  return wire.type === 'tcpOutgoing'
    ? (sourceOf(wire) ?? `:${wire.remotePort ?? 0}`)
    : `${bareAddress(wire) ?? ''}|${wire.peerId}`
}

function sourceOf(wire: Wire): string | undefined {
  const ip = socketAddress(wire.remoteAddress)
  return ip && formatAddress(ip, wire.remotePort ?? 0)
}

function bareAddress(wire: Wire): string | undefined {
  const ip = socketAddress(wire.remoteAddress)
  return ip && formatIp(ip)
}

function isOwnAddress(ip: string): boolean {
  return Object.values(networkInterfaces()).some((list) => list?.some(({ address }) => address === ip))
}

/** A torrent as parse-torrent would have read it. */
function parsedTorrent(metainfo: Metainfo): object {
  const { infoHash, name, length, pieceLength } = metainfo
  const pieces = Buffer.from(metainfo.pieces)
  return {
    infoHash: Buffer.from(infoHash).toString(),
    name,
    length,
    pieceLength,
    lastPieceLength: length % pieceLength || pieceLength,
    pieces: pieceHashes(metainfo),
    files: [{ path: name, name, length, offset: 0 }],
    private: true,
    announce: [],
    urlList: [],
    info: { length, name, 'piece length': pieceLength, pieces, private: 1 },
  }
}

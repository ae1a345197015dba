import type { Endpoint, Ip } from '../../lib/protocol/address.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import type { Metainfo } from '../../lib/protocol/metainfo.ts'

/** A peer to try. `distance`: 0 same rack … 255 unknown; `reserve` peers are for when no near peer helps. */
export interface EnginePeer {
  readonly endpoint: Endpoint
  readonly distance: number
  readonly reserve: boolean
}

/** Bytes a second; undefined means no limit. */
export interface Rates {
  readonly downloadBytesPerSecond: number | undefined
  readonly uploadBytesPerSecond: number | undefined
}

/** Of the whole host, and within that for all peers of a distance or more together: 1 is whatever leaves the rack. */
export interface Limits extends Rates {
  readonly fromDistance?: ReadonlyMap<number, Rates>
}

/** What is known of a swarm. */
interface SwarmOptions {
  /** How many hosts have everything, this one included, as the tracker last said; undefined where it is not known. */
  readonly seeds?: (() => number | undefined) | undefined
}

/** The server as a source, while the grant allows it. */
export interface Webseed {
  /** A secret. */
  readonly url: string
  /** The pieces to fetch from it. Default: any. */
  readonly range?: PieceRange | undefined
  /** All of the range is here or asked for: another may be given. Called once. */
  readonly rangeDone?: (() => void) | undefined
}

/** Pieces in a row. */
export interface PieceRange {
  readonly firstPiece: number
  readonly pieceCount: number
}

export interface FetchOptions extends SwarmOptions {
  readonly metainfo: Metainfo
  /** Where the bytes go; may hold a part from an earlier run, which is checked, not trusted. */
  readonly file: string
  readonly peers: AsyncIterable<EnginePeer>
  readonly webseed: Webseed | undefined
  /** Aborts the fetch: `done` rejects with the signal's reason, the part on disk stays. Once `done`, the handle seeds until `close`. */
  readonly signal: AbortSignal
}

export interface SeedOptions extends SwarmOptions {
  readonly metainfo: Metainfo
  /** A whole, verified copy; it is not hashed again. */
  readonly file: string
  readonly peers: AsyncIterable<EnginePeer>
  readonly signal: AbortSignal
}

/** Where a peer says it is, from the `rs` member of the extended handshake; statistics only, never trusted. */
export interface PeerTraffic {
  /** `ip:port`, or `webseed`. */
  readonly source: string
  readonly place: string | undefined
  readonly kind: 'peer' | 'webseed'
  readonly downloadedBytes: number
  readonly uploadedBytes: number
}

/** A connection as it is now: what a person needs to see why a fetch is slow. */
export interface PeerState {
  /** `ip:port`. */
  readonly source: string
  readonly host: string | undefined
  readonly place: string | undefined
  /** 0 same rack … 255 unknown. */
  readonly distance: number
  readonly incoming: boolean
  /** Bytes a second, over the last seconds. */
  readonly downloadRate: number
  readonly uploadRate: number
  /** Bytes asked for and not here yet; bytes asked of us and not sent yet. */
  readonly requestedBytes: number
  readonly owedBytes: number
  /** The share of the pieces that it has, 0 to 1. */
  readonly progress: number
  /** Why nothing is asked of it; undefined while something is. */
  readonly waiting: string | undefined
}

/** One torrent in an engine. */
export interface EngineHandle {
  /** Resolves when every piece is verified and written; for a seed, at once. Rejects when the fetch cannot go on. */
  readonly done: Promise<void>
  /** Pieces verified and on disk, by index. */
  has(piece: number): boolean
  /** Called after each piece is verified and its write has returned. At most one listener. */
  onPiece(listener: (piece: number) => void): void
  /** Bytes verified. */
  readonly bytesVerified: number
  /** Why nothing moves, in words; undefined while bytes arrive. */
  readonly waitingReason: string | undefined
  /** Traffic by source since the start; sources are bounded, the rest is summed under `other`. */
  traffic(): readonly PeerTraffic[]
  readonly peerCount: number
  /** The connections there are. */
  peers(): readonly PeerState[]
  /** What was asked for still comes, and what is missing of ranges that are done is still fetched. */
  setWebseed(webseed: Webseed | undefined): void
  /** Stops and forgets the torrent; files stay. */
  close(): Promise<void>
}

/**
 * Moves pieces between hosts. Engines never see a tracker: peers come in as an iterable. Every implementation passes
 * test/agent/engine/engine.contract.ts:
 *
 * - nothing is counted as verified before its SHA-1 matched and its write returned;
 * - a fetch goes on from what is on disk, after `kill -9` too;
 * - a peer that lies, stalls or closes costs time, never the fetch, while another source is reachable;
 * - memory and connections are bounded, whatever peers do.
 */
export interface Engine extends AsyncDisposable {
  readonly name: string
  /** The port peers dial. */
  readonly port: number
  /** 20 bytes. */
  readonly peerId: Uint8Array
  fetch(options: FetchOptions): EngineHandle
  seed(options: SeedOptions): EngineHandle
  setLimits(limits: Limits): void
}

/** A peer that has shown that it may take part. What it says of itself is no longer only its own word. */
export interface Admitted {
  /** Milliseconds since 1970. */
  readonly untilMs: number
  readonly host: string
  /** The operator's word on where it is; undefined where its token does not say. */
  readonly place: string | undefined
}

/** What this host shows other agents. */
export interface PeerTokenSource {
  /** The token that proves that this host may have the torrent; undefined where it has none. */
  tokenFor(infoHash: InfoHash): string | undefined
}

/** Where a token came from. */
export interface TokenSender {
  readonly ip: Ip
  /** Of the certificate that it came under, base64url; undefined without TLS. */
  readonly thumbprint: string | undefined
}

/** Who may take part in a swarm, where not everyone may. */
export interface PeerAdmission {
  /** Whom a token lets take part; undefined where it lets nobody. Never rejects. */
  admit(token: string, infoHash: InfoHash, from: TokenSender): Promise<Admitted | undefined>
}

/** TLS between agents, under certificates that their tokens name. */
export interface PeerTls {
  /** Also dials with it, and takes no connection without it. */
  readonly required: boolean
  /** PEM. */
  readonly key: string
  readonly certificate: string
}

export interface EngineConfig {
  readonly port: number
  /** The address to listen on and to dial from. Default: every address, and what the system chooses. */
  readonly address?: string | undefined
  /** Per torrent. */
  readonly connectionsMax: number
  /** Told to other Rackswarm agents in the extended handshake. */
  readonly identity: { readonly host: string; readonly place: string | undefined }
  readonly limits: Limits
  /** Default: no tokens are shown. */
  readonly peerTokens?: PeerTokenSource | undefined
  /** Admits only peers with a token for the torrent. Default: anyone. */
  readonly admission?: PeerAdmission | undefined
  /** A peer sent bytes that are not those of the torrent, and is not talked to for a while. `address`: `ip:port`, or the `ip` that it dialled from. */
  peerBanned?(address: string, infoHash: InfoHash): void
  /** Default: connections with TLS are not taken. */
  readonly tls?: PeerTls | undefined
}

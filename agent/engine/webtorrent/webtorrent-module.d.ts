// The parts of webtorrent 3 and its wire protocol that we use, some of them private there; the exact versions are pinned in package.json.
declare module 'bittorrent-protocol' {
  export default class Wire {
    readonly peerRequests: readonly unknown[]
    readonly _readableState: { readonly buffered: number }
    destroy(): void
    _write: (this: Wire, data: Uint8Array, done: (error: Error | null) => void) => void
    _onMessageLength: (this: Wire, bytes: Uint8Array) => void
    _onRequest: (this: Wire, index: number, offset: number, length: number) => void
  }
}

declare module 'webtorrent' {
  import type { EventEmitter } from 'node:events'
  import type { Server } from 'node:net'

  export interface Wire extends EventEmitter {
    readonly type: string
    readonly peerId: string
    readonly remoteAddress: string | undefined
    readonly remotePort: number | undefined
    readonly downloaded: number
    readonly uploaded: number
    readonly destroyed: boolean
    readonly isSeeder: boolean | undefined
    readonly peerChoking: boolean
    readonly amInterested: boolean
    readonly extendedHandshake: Record<string, unknown>
    readonly peerExtendedHandshake: Record<string, unknown> | undefined
    readonly requests: readonly unknown[]
    readonly peerPieces: { get(piece: number): boolean }
    downloadSpeed(): number
    uploadSpeed(): number
    readonly peerRequests: readonly unknown[]
    setTimeout(ms: number, unref: boolean): void
    have(index: number): void
    destroy(): void
  }

  export interface Piece {
    readonly length: number
    readonly _chunks: number
    readonly _reservations: number
    readonly _cancellations: readonly number[] | null
    reserveRemaining(): number
    cancelRemaining(reservation: number): void
  }

  export interface Torrent extends EventEmitter {
    readonly infoHash: string
    readonly ready: boolean
    readonly destroyed: boolean
    readonly wires: readonly Wire[]
    readonly pieces: (Piece | null)[]
    readonly _hashes: readonly string[]
    readonly _reservations: ((Wire | null)[] | null)[]
    readonly store: {
      put(index: number, bytes: Uint8Array, done: (error?: Error | null) => void): void
    } | null
    addPeer(address: string): boolean
    removePeer(address: string): void
    destroy(options: { destroyStore: boolean }, done: () => void): void
    _markVerified(index: number): void
    readonly _rarityMap: { readonly _pieces: readonly number[] }
    _updateWire: (wire: Wire) => void
    _request(wire: Wire, piece: number, hotswap: boolean): boolean
    _checkDone(): boolean
    _update(): void
    _destroy(error: Error): void
  }

  export class WebTorrent extends EventEmitter {
    constructor(options: Record<string, unknown>)
    readonly torrentPort: number
    readonly peerId: string
    readonly destroyed: boolean
    readonly _connPool: { readonly tcpServer: Server } | null
    add(torrent: object, options: Record<string, unknown>): Torrent
    throttleDownload(bytesPerSecond: number): void
    throttleUpload(bytesPerSecond: number): void
    destroy(done: () => void): void
  }
  export default WebTorrent
}

import type { PieceRange } from '../agent/engine/engine.ts'
import type { Fetch } from './fetch.ts'
import type { FlowId, LinkId, Network } from './network.ts'
import type { News } from './news.ts'
import type { AskQueue } from './ask-queue.ts'

export interface Blob {
  readonly index: number
  readonly pieceCount: number
  readonly pieceLength: number
  readonly length: number
}

export interface Host {
  readonly index: number
  readonly rack: number
  /** Links from the host to where racks meet, and back: its own, its rack's, its row's. */
  readonly up: readonly LinkId[]
  readonly down: readonly LinkId[]
  readonly isStandard: boolean
  isAlive: boolean
  readonly fetches: Fetch[]
}

/** What fetches share. */
export interface World {
  readonly network: Network
  readonly random: () => number
  nowMs(): number
  /** A flow into a rack, for what it is to bring. */
  addFlow(queue: AskQueue, way: readonly LinkId[], rack: number): FlowId
  readonly news: News
  /** By number of the fetch, near and far in turn: until when it has no room for another piece to send, unless a turn ends. */
  readonly busyUntilMs: Float64Array
  /** Tells a fetch that the peer in one of its slots has a piece, and wakes it. */
  tell(fetch: number, slot: number, piece: number): void
  finished(fetch: Fetch): void
  /** @returns its number, which `wakeLater` and `news` take */
  enter(fetch: Fetch): number
  /** To be woken at the end of the step. */
  wakeLater(fetch: number): void
  /** What one host says takes time to come to another. */
  readonly isDelayed: boolean
  after(ms: number, act: () => void): void
  /** Does something once what one host says has come to another, `ways` times. */
  later(ways: number, act: () => void): void
}

/** The server, where a host may fetch from it. */
export interface WebseedSource {
  readonly way: readonly LinkId[]
  /** Default: all of the build. */
  readonly range: PieceRange | undefined
  /** All of it is here or asked for. */
  rangeDone(): void
}

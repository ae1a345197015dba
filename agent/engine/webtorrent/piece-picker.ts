import { shuffled } from '../picker.ts'

/** The part of a webtorrent piece that says whether a block of it is free to be asked for. */
interface OpenPiece {
  readonly _chunks: number
  readonly _reservations: number
  readonly _cancellations: readonly number[] | null
}

export interface PiecePicker {
  /**
   * The piece to ask a peer for: one begun already, so that it can soon be passed on, else the rarest, and among equally
   * rare ones a random one, another on every host. Undefined: every piece that the peer has is there or on its way.
   */
  next(
    pieces: readonly (OpenPiece | null)[],
    availability: readonly number[],
    hasPiece: (piece: number) => boolean,
  ): number | undefined
  /** Missing pieces all of whose blocks somebody was asked for, at most 16. */
  unfinished(pieces: readonly (OpenPiece | null)[], hasPiece: (piece: number) => boolean): number[]
}

const unfinishedMax = 16

/** Rarest first (BEP 3) over `count` pieces; `random` gives numbers in [0, 1). One pass over the missing pieces a call. */
export function createPiecePicker(count: number, random: () => number): PiecePicker {
  const missing = [...shuffled(count, random)]
  /** Drops what is there from the list on the way, so that the passes get shorter. */
  function* openPieces(pieces: readonly (OpenPiece | null)[]): Generator<[number, OpenPiece]> {
    for (let i = missing.length - 1; i >= 0; i--) {
      const index = missing[i] ?? 0
      const piece = pieces[index]
      if (piece) yield [index, piece]
      else missing.splice(i, 1)
    }
  }
  return {
    next: (pieces, availability, hasPiece) => {
      let rarest: number | undefined
      let peers = Infinity
      for (const [index, piece] of openPieces(pieces)) {
        if (!hasFreeBlock(piece) || !hasPiece(index)) continue
        if (piece._reservations > 0) return index
        const known = availability[index] ?? 0
        if (known < peers) {
          rarest = index
          peers = known
        }
      }
      return rarest
    },
    unfinished: (pieces, hasPiece) => {
      const found: number[] = []
      for (const [index] of openPieces(pieces)) {
        if (hasPiece(index)) found.push(index)
        if (found.length === unfinishedMax) break
      }
      return found
    },
  }
}

function hasFreeBlock({ _chunks, _reservations, _cancellations }: OpenPiece): boolean {
  return _reservations < _chunks || (_cancellations?.length ?? 0) > 0
}

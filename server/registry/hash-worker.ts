// Hashes and writes uploads in a worker thread. Each upload is a file, a SHA-256, and, where the length was declared, a
// SHA-1 for each piece. In: {id, call}. Out: {id, answer} or {id, error}.
import type { Hash } from 'node:crypto'
import { createHash } from 'node:crypto'
import { closeSync, fdatasyncSync, fstatSync, ftruncateSync, openSync, readSync, writeSync } from 'node:fs'
import { parentPort } from 'node:worker_threads'
import { pieceLengthFor } from '../../lib/protocol/metainfo.ts'

export type HashCall =
  /** Opens the file; bytes that are in it already are read again first (a session from before a restart). */
  | {
      readonly op: 'open'
      readonly upload: string
      readonly file: string
      /** Another file, whose bytes come first: those of a session that another server has begun. */
      readonly from: string | undefined
      readonly length: number | undefined
    }
  /** The bytes are moved here, and back with the answer, to be filled again. */
  | {
      readonly op: 'append'
      readonly upload: string
      readonly at: number
      readonly bytes: Uint8Array<ArrayBuffer>
    }
  | { readonly op: 'sync'; readonly upload: string }
  /** Syncs and closes; the hashes are of all that was appended. SHA-512 is asked for at the end alone, and costs a pass of its own. */
  | { readonly op: 'finish'; readonly upload: string; readonly sha512: boolean }
  | { readonly op: 'drop'; readonly upload: string }

export interface HashAnswer {
  /** Bytes in the file. */
  readonly offset: number
  readonly sha256Hex?: string
  readonly sha512Hex?: string | undefined
  /** SHA-1 of each piece, joined. */
  readonly pieces?: Uint8Array<ArrayBuffer>
  /** What was appended, for its sender to use again. */
  readonly bytes?: Uint8Array<ArrayBuffer>
}

interface Upload {
  readonly descriptor: number
  readonly length: number | undefined
  readonly sha256: Hash
  readonly pieces: PieceHasher | undefined
  offset: number
}

const uploads = new Map<string, Upload>()
const readSize = 1024 * 1024

parentPort?.on('message', ({ id, call }: { id: number; call: HashCall }) => {
  try {
    const answer = run(call)
    const moved = [answer.pieces, answer.bytes].flatMap((bytes) => (bytes ? [bytes.buffer] : []))
    parentPort?.postMessage({ id, answer }, moved)
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? String(error.code) : undefined
    parentPort?.postMessage({
      id,
      error: { message: error instanceof Error ? error.message : String(error), code },
    })
  }
})

function run(call: HashCall): HashAnswer {
  if (call.op === 'open') return open(call)
  const upload = uploads.get(call.upload)
  if (call.op === 'drop') {
    uploads.delete(call.upload)
    if (upload) closeSync(upload.descriptor)
    return { offset: 0 }
  }
  if (!upload) throw new Error('this upload is not open')
  if (call.op === 'sync') {
    fdatasyncSync(upload.descriptor)
    return { offset: upload.offset }
  }
  if (call.op === 'append') return append(upload, call.at, call.bytes)
  uploads.delete(call.upload)
  try {
    fdatasyncSync(upload.descriptor)
    // A length that was not declared, or was declared wrong, means other pieces: the second pass.
    const pieces =
      upload.pieces && upload.length === upload.offset
        ? upload.pieces
        : hashPieces(upload.descriptor, upload.offset)
    const sha512Hex = call.sha512 ? hashSha512(upload.descriptor, upload.offset) : undefined
    return {
      offset: upload.offset,
      sha256Hex: upload.sha256.digest('hex'),
      sha512Hex,
      pieces: pieces.finish(),
    }
  } finally {
    closeSync(upload.descriptor)
  }
}

function open({ upload: id, file, from, length }: Extract<HashCall, { op: 'open' }>): HashAnswer {
  const descriptor = openSync(file, 'a+', 0o644)
  const upload: Upload = {
    descriptor,
    length,
    sha256: createHash('sha256'),
    pieces: length === undefined ? undefined : new PieceHasher(pieceLengthFor(length)),
    offset: 0,
  }
  const take = (bytes: Uint8Array) => {
    upload.sha256.update(bytes)
    upload.pieces?.update(bytes)
    upload.offset += bytes.length
  }
  try {
    if (from === undefined) readAll(descriptor, fstatSync(descriptor).size, take)
    else copyFrom(from, descriptor, take)
  } catch (error) {
    closeSync(descriptor)
    throw error
  }
  uploads.set(id, upload)
  return { offset: upload.offset }
}

function copyFrom(file: string, descriptor: number, take: (bytes: Uint8Array) => void): void {
  const source = openSync(file, 'r')
  try {
    readAll(source, fstatSync(source).size, (bytes) => {
      writeAll(descriptor, bytes)
      take(bytes)
    })
    fdatasyncSync(descriptor)
  } finally {
    closeSync(source)
  }
}

function append(upload: Upload, at: number, bytes: Uint8Array<ArrayBuffer>): HashAnswer {
  // Batches are sent ahead: behind one that failed, the next must not take its place.
  if (at !== upload.offset) throw new Error(`the bytes before ${at} are missing`)
  try {
    writeAll(upload.descriptor, bytes)
  } catch (error) {
    // What was not written whole is not hashed: the session stays at the last offset that was confirmed.
    ftruncateSync(upload.descriptor, upload.offset)
    throw error
  }
  upload.sha256.update(bytes)
  upload.pieces?.update(bytes)
  upload.offset += bytes.length
  return { offset: upload.offset, bytes }
}

function writeAll(descriptor: number, bytes: Uint8Array): void {
  for (let written = 0; written < bytes.length;)
    written += writeSync(descriptor, bytes, written, bytes.length - written)
}

function hashPieces(descriptor: number, length: number): PieceHasher {
  const pieces = new PieceHasher(pieceLengthFor(length))
  readAll(descriptor, length, (bytes) => {
    pieces.update(bytes)
  })
  return pieces
}

function hashSha512(descriptor: number, length: number): string {
  const hash = createHash('sha512')
  readAll(descriptor, length, (bytes) => {
    hash.update(bytes)
  })
  return hash.digest('hex')
}

function readAll(descriptor: number, length: number, each: (bytes: Uint8Array) => void): void {
  const buffer = Buffer.allocUnsafe(Math.min(readSize, Math.max(1, length)))
  for (let at = 0; at < length;) {
    const read = readSync(descriptor, buffer, 0, Math.min(buffer.length, length - at), at)
    if (read === 0) throw new Error(`the file ends at ${at} of ${length} bytes`)
    each(buffer.subarray(0, read))
    at += read
  }
}

/** SHA-1 of consecutive pieces, whatever sizes the bytes come in. */
class PieceHasher {
  readonly #pieceLength: number
  readonly #digests: Buffer[] = []
  #hash = createHash('sha1')
  #inPiece = 0

  constructor(pieceLength: number) {
    this.#pieceLength = pieceLength
  }

  update(bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length;) {
      const part = bytes.subarray(at, at + this.#pieceLength - this.#inPiece)
      this.#hash.update(part)
      this.#inPiece += part.length
      at += part.length
      if (this.#inPiece === this.#pieceLength) this.#next()
    }
  }

  finish(): Uint8Array<ArrayBuffer> {
    if (this.#inPiece > 0) this.#next()
    const joined = new Uint8Array(20 * this.#digests.length)
    for (const [i, digest] of this.#digests.entries()) joined.set(digest, 20 * i)
    return joined
  }

  #next(): void {
    this.#digests.push(this.#hash.digest())
    this.#hash = createHash('sha1')
    this.#inPiece = 0
  }
}

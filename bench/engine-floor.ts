// What moving a blob costs at the least. The seeder reads the file and sends it over one TCP connection, with no protocol at all; the
// fetcher reads into one buffer and puts pieces together in shared memory, and a thread of its own hashes (SHA-1) and writes them.
import { hash } from 'node:crypto'
import { closeSync, openSync, readSync, writeSync } from 'node:fs'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads'
import type { Metainfo } from '../lib/protocol/metainfo.ts'
import { pieceCount, pieceHashes, pieceSize } from '../lib/protocol/metainfo.ts'

const host = '127.0.0.1'
const sendBytes = 1024 * 1024
const receiveBytes = 256 * 1024
/** Pieces that wait for the thread, as much as our own engine holds; more stop the reading. */
const heldMax = 24 * 1024 * 1024

interface FloorWork {
  readonly path: string
  /** SHA-1 of each piece, in hex. */
  readonly hashes: readonly string[]
  readonly pieceLength: number
}

interface FloorPiece {
  readonly index: number
  readonly bytes: Uint8Array
}

if (!isMainThread) hashAndWrite()

export async function startFloorSeeder(file: string) {
  const server = createServer((socket) => {
    socket.on('error', () => undefined)
    void send(socket, file)
  })
  await new Promise<void>((settle) => server.listen(0, host, settle))
  return {
    port: (server.address() as AddressInfo).port,
    fetch: () => Promise.reject(new Error('A seeder does not fetch')),
  }
}

async function send(socket: Socket, file: string): Promise<void> {
  const descriptor = openSync(file, 'r')
  // One is filled while the kernel takes the other.
  const chunks = [0, 1].map(() => ({ bytes: Buffer.allocUnsafeSlow(sendBytes), taken: Promise.resolve() }))
  const ended = new Promise<void>((settle) => socket.once('close', () => settle()))
  try {
    for (let turn = 0; ; turn++) {
      const chunk = chunks[turn % chunks.length]
      if (chunk === undefined) return
      await Promise.race([chunk.taken, ended])
      if (socket.destroyed) return
      const read = readSync(descriptor, chunk.bytes)
      if (read === 0) break
      chunk.taken = new Promise((settle) => socket.write(chunk.bytes.subarray(0, read), () => settle()))
    }
    await Promise.race([Promise.all(chunks.map(({ taken }) => taken)), ended])
    socket.end()
  } finally {
    closeSync(descriptor)
  }
}

export async function prepareFloorFetch(metainfo: Metainfo, file: string) {
  const work: FloorWork = {
    path: file,
    hashes: pieceHashes(metainfo),
    pieceLength: metainfo.pieceLength,
  }
  const worker = new Worker(new URL(import.meta.url), { workerData: work })
  await new Promise((settle) => worker.once('online', settle))
  return { port: 0, fetch: (from: number) => receive(from, metainfo, worker) }
}

function receive(from: number, metainfo: Metainfo, worker: Worker): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<undefined>()
  const count = pieceCount(metainfo)
  const free: Uint8Array[] = []
  let memory: Uint8Array | undefined
  let index = 0
  let filled = 0
  let held = 0
  let written = 0

  const take = (bytes: Buffer): void => {
    for (let at = 0; at < bytes.length;) {
      memory ??= free.pop() ?? new Uint8Array(new SharedArrayBuffer(metainfo.pieceLength))
      const size = pieceSize(metainfo, index)
      const part = bytes.subarray(at, at + size - filled)
      memory.set(part, filled)
      at += part.length
      filled += part.length
      if (filled < size) continue
      worker.postMessage({ index, bytes: memory.subarray(0, size) } satisfies FloorPiece)
      held += metainfo.pieceLength
      memory = undefined
      filled = 0
      index++
    }
  }
  const socket = connect({
    host,
    port: from,
    onread: {
      buffer: Buffer.allocUnsafeSlow(receiveBytes),
      callback: (length, buffer) => {
        take(Buffer.from(buffer.buffer, buffer.byteOffset, length))
        return held < heldMax
      },
    },
  })
  socket.once('error', reject)
  socket.once('close', () => {
    if (index < count) reject(new Error(`The seeder has sent ${index} of ${count} pieces`))
  })
  worker.once('error', reject)
  worker.on('message', ({ bytes }: FloorPiece) => {
    free.push(new Uint8Array(bytes.buffer))
    held -= metainfo.pieceLength
    socket.resume()
    if (++written === count) resolve(undefined)
  })
  return promise
}

function hashAndWrite(): void {
  const { path, hashes, pieceLength } = workerData as FloorWork
  const descriptor = openSync(path, 'wx')
  parentPort?.on('message', (piece: FloorPiece) => {
    const { index, bytes } = piece
    if (hash('sha1', bytes, 'hex') !== hashes[index])
      throw new Error(`Piece ${index} is not what it should be`)
    for (let done = 0; done < bytes.length;)
      done += writeSync(descriptor, bytes, done, bytes.length - done, index * pieceLength + done)
    parentPort?.postMessage(piece)
  })
}

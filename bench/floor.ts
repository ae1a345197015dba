// What moving a build to the server costs at the least, in two processes. The client reads, hashes (SHA-256) and
// sends; the server receives, hashes (SHA-256, SHA-1 per piece), writes and syncs, the last three in a worker thread.
import { createHash } from 'node:crypto'
import { closeSync, createReadStream, fdatasyncSync, openSync, statSync, writeSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { connect, createServer } from 'node:net'
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads'
import { pieceLengthFor } from '../lib/protocol/metainfo.ts'

const [mode, file = '', port] = process.argv.slice(2)
const inFlightMax = 16 * 1024 * 1024

if (!isMainThread) hashAndWrite()
else if (mode === 'receive') receive()
else await send()

async function send(): Promise<void> {
  const hash = createHash('sha256')
  const socket = connect(Number(port), '127.0.0.1')
  const acknowledged = new Promise((settle) => socket.once('data', settle))
  const header = Buffer.alloc(8)
  header.writeBigUInt64BE(BigInt(statSync(file).size))
  socket.write(header)
  for await (const chunk of createReadStream(file, { highWaterMark: 1024 * 1024 }) as AsyncIterable<Buffer>) {
    hash.update(chunk)
    if (!socket.write(chunk)) await new Promise((settle) => socket.once('drain', settle))
  }
  hash.digest()
  await acknowledged
  socket.end()
}

function receive(): void {
  const server = createServer((socket) => {
    let worker: Worker | undefined
    let left = -1
    let inFlight = 0
    let batch: Buffer[] = []
    let batched = 0
    const flush = () => {
      const bytes = new Uint8Array(batched)
      let at = 0
      for (const part of batch) {
        bytes.set(part, at)
        at += part.length
      }
      inFlight += batched
      if (inFlight > inFlightMax) socket.pause()
      worker?.postMessage(bytes, [bytes.buffer])
      batch = []
      batched = 0
    }
    socket.on('data', (data: Buffer) => {
      let part = data
      if (left < 0) {
        left = Number(part.readBigUInt64BE(0))
        part = part.subarray(8)
        worker = new Worker(new URL(import.meta.url), { workerData: { file, length: left } })
        worker.on('message', (done: number) => {
          inFlight -= done
          if (done < 0) socket.write('1')
          else if (inFlight <= inFlightMax) socket.resume()
        })
      }
      left -= part.length
      batch.push(part)
      batched += part.length
      if (batched >= 1024 * 1024 || left === 0) flush()
      if (left === 0) worker?.postMessage('end')
    })
    socket.on('error', () => undefined)
  })
  server.listen(0, '127.0.0.1', () => process.stdout.write(`${(server.address() as AddressInfo).port}\n`))
}

function hashAndWrite(): void {
  const { file: path, length } = workerData as { file: string; length: number }
  const descriptor = openSync(path, 'w')
  const pieceLength = pieceLengthFor(length)
  const whole = createHash('sha256')
  let piece = createHash('sha1')
  let pieceLeft = pieceLength
  parentPort?.on('message', (message: Uint8Array | 'end') => {
    if (message === 'end') {
      whole.digest()
      fdatasyncSync(descriptor)
      closeSync(descriptor)
      parentPort?.postMessage(-1)
      return
    }
    whole.update(message)
    for (let at = 0; at < message.length;) {
      const part = message.subarray(at, at + pieceLeft)
      piece.update(part)
      at += part.length
      pieceLeft -= part.length
      if (pieceLeft === 0) {
        piece.digest()
        piece = createHash('sha1')
        pieceLeft = pieceLength
      }
    }
    writeSync(descriptor, message)
    parentPort?.postMessage(message.length)
  })
}

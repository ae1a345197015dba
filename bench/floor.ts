// What moving a build to the server costs at the least, in two processes. The client reads, hashes (SHA-256) and
// sends; the server receives, hashes (SHA-256, SHA-1 per piece), writes and syncs, the last three in a worker thread.
import { createHash } from 'node:crypto'
import { closeSync, fdatasyncSync, openSync, readSync, statSync, writeSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { connect, createServer } from 'node:net'
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads'
import { pieceLengthFor } from '../lib/protocol/metainfo.ts'

const [mode, file = '', port] = process.argv.slice(2)
const inFlightMax = 16 * 1024 * 1024
const batchBytes = 1024 * 1024

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
  const descriptor = openSync(file, 'r')
  const chunk = Buffer.allocUnsafeSlow(batchBytes)
  for (let read = 1; read > 0;) {
    read = readSync(descriptor, chunk)
    const bytes = chunk.subarray(0, read)
    hash.update(bytes)
    // The buffer is filled again when the kernel has all of it.
    await new Promise((settle) => socket.write(bytes, settle))
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
    const free: Uint8Array<ArrayBuffer>[] = []
    let batch = new Uint8Array(batchBytes)
    let filled = 0
    const flush = () => {
      inFlight += filled
      if (inFlight > inFlightMax) socket.pause()
      worker?.postMessage(batch.subarray(0, filled), [batch.buffer])
      batch = free.pop() ?? new Uint8Array(batchBytes)
      filled = 0
    }
    socket.on('data', (data: Buffer<ArrayBuffer>) => {
      let part = data.subarray(left < 0 ? 8 : 0)
      if (left < 0) {
        left = Number(data.readBigUInt64BE(0))
        worker = new Worker(new URL(import.meta.url), { workerData: { file, length: left } })
        worker.on('message', (written: Uint8Array<ArrayBuffer> | 'synced') => {
          if (written === 'synced') {
            socket.write('1')
            return
          }
          inFlight -= written.length
          free.push(new Uint8Array(written.buffer))
          if (inFlight <= inFlightMax) socket.resume()
        })
      }
      left -= part.length
      while (part.length > 0) {
        const fits = part.subarray(0, batchBytes - filled)
        batch.set(fits, filled)
        filled += fits.length
        part = part.subarray(fits.length)
        if (filled === batchBytes) flush()
      }
      // Left to the collector, each 64 MiB of these would have it run.
      if (data.length === data.buffer.byteLength) data.buffer.transfer(0)
      if (left > 0) return
      if (filled > 0) flush()
      worker?.postMessage('end')
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
  parentPort?.on('message', (message: Uint8Array<ArrayBuffer> | 'end') => {
    if (message === 'end') {
      whole.digest()
      fdatasyncSync(descriptor)
      closeSync(descriptor)
      parentPort?.postMessage('synced')
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
    parentPort?.postMessage(message, [message.buffer])
  })
}

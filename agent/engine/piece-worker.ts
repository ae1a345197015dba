// Checks pieces and writes them, off the event loop. What it is asked for it does in order, synchronously.
import { hash } from 'node:crypto'
import { closeSync, openSync, readSync, writeSync } from 'node:fs'
import { parentPort } from 'node:worker_threads'
import type { PieceReply, PieceRequest } from './piece-store.ts'

const files = new Map<number, number>()
/** Pieces on disk are read into this. */
let scratch = new Uint8Array(0)

parentPort?.on('message', (request: PieceRequest) => {
  if (request.kind === 'close') {
    const descriptor = files.get(request.file)
    files.delete(request.file)
    if (descriptor !== undefined) closeSync(descriptor)
    return
  }
  let reply: PieceReply
  try {
    reply = { id: request.id, right: request.kind === 'write' ? write(request) : check(request) }
  } catch (error) {
    const { message, code } = error as NodeJS.ErrnoException
    reply = { id: request.id, message, code }
  }
  parentPort?.postMessage(reply)
})

function write({ file, path, position, bytes, sha1 }: Extract<PieceRequest, { kind: 'write' }>): boolean {
  if (!matches(bytes, sha1)) return false
  const descriptor = openOnce(file, path)
  for (let done = 0; done < bytes.length;)
    done += writeSync(descriptor, bytes, done, bytes.length - done, position + done)
  return true
}

/** Whether the piece is on disk already. */
function check({ file, path, position, length, sha1 }: Extract<PieceRequest, { kind: 'check' }>): boolean {
  const descriptor = openOnce(file, path)
  if (scratch.length < length) scratch = new Uint8Array(length)
  const bytes = scratch.subarray(0, length)
  for (let done = 0; done < length;) {
    const read = readSync(descriptor, bytes, done, length - done, position + done)
    if (read === 0) return false
    done += read
  }
  return matches(bytes, sha1)
}

function matches(bytes: Uint8Array, sha1: string): boolean {
  return hash('sha1', bytes, 'hex') === sha1
}

function openOnce(file: number, path: string): number {
  const known = files.get(file)
  if (known !== undefined) return known
  const descriptor = openPart(path)
  files.set(file, descriptor)
  return descriptor
}

function openPart(path: string): number {
  try {
    return openSync(path, 'r+')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    return openSync(path, 'wx+', 0o640)
  }
}

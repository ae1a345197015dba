import { createReadStream } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { open, rename, unlink } from 'node:fs/promises'
import { dirname } from 'node:path'
import { crc32 } from 'node:zlib'
import type { Family } from '../../../lib/protocol/address.ts'
import { infoHashFromBytes } from '../../../lib/protocol/infohash.ts'
import { ignoreMissing, isMissing, syncDirectory } from '../../../lib/runtime/files.ts'
import type { Topology } from '../topology.ts'
import { isLeafPlace } from '../topology.ts'
import type { FamilySwarms, Kind } from './family-swarms.ts'
import type { MemoryPeerStore } from './memory-peer-store.ts'
import type { SwarmTable } from './swarm-table.ts'

/**
 * A snapshot of a store. Numbers are big-endian.
 *
 * - 16 bytes: `RSWARMS1`, and when it was saved, milliseconds since 1970, as a double.
 * - Frames: payload length 4, CRC-32 of the payload 4, payload: its kind 1, then records.
 *   - kind 4 and 6, peers of a family: infohash 20, seeder (0) or leecher (1) 1, seconds of life 2, place 4, peer_id 20, endpoint 6 or 18
 *   - kind 1, swarms with completions: infohash 20, downloaded 4
 *   - kind 0: the end; what has none was cut short, and is good up to there
 */
const magic = Buffer.from('RSWARMS1')
const headBytes = 16
const frameHeadBytes = 8
const kinds = { end: 0, swarms: 1 } as const
const peerFieldsBytes = 47
const swarmBytes = 24

/** Peers looked at while the store is locked: 0.3 ms, which an announce may have to wait. */
const peersPerFrame = 512
const frameBytesMax = 64 * 1024
/** Frames collected into one write, and what is read at a time. */
const writeBytes = 256 * 1024
/** Whoever was silent for longer than this is not there any more, whatever the snapshot says. */
const ageMaxMs = 60 * 60 * 1000
/** A peer could not announce while the tracker was gone: it gets this long to do so. */
const graceSeconds = 120

/**
 * Writes a store to a file, whole or not at all. The store is only locked for one frame at a time, so a peer that comes or goes
 * meanwhile may be in it or not.
 *
 * @returns how many peers were written
 */
export async function saveSnapshot(
  store: MemoryPeerStore,
  file: string,
  nowMs: number,
): Promise<{ peers: number; bytes: number }> {
  const temporary = `${file}.tmp`
  let peers = 0
  let bytes = 0
  try {
    await using handle: FileHandle = await open(temporary, 'w', 0o600)
    // One buffer for all of it: a new one for each frame would grow the process by what waits to be collected, some 60 MiB.
    const output = Buffer.allocUnsafe(writeBytes + frameBytesMax)
    let end = head(nowMs).copy(output)
    const flush = async () => {
      // All of it or an error: a disk that is nearly full takes a part without a word.
      await handle.writeFile(output.subarray(0, end))
      bytes += end
      end = 0
    }
    for (const { frame, records } of frames(store, () => output.subarray(end))) {
      end += frame.length
      peers += records
      if (end >= writeBytes) await flush()
    }
    await flush()
    await handle.sync()
    await rename(temporary, file)
  } catch (error) {
    await unlink(temporary).catch(ignoreMissing)
    throw error
  }
  await syncDirectory(dirname(file))
  return { peers, bytes }
}

/**
 * Reads a snapshot into a store. What is damaged, and all after it, is left out.
 *
 * @returns how many peers there are now, and what was wrong with the file, if anything was; undefined where there is no file
 */
export async function loadSnapshot(
  store: MemoryPeerStore,
  file: string,
  { topology, nowMs }: { topology: Topology; nowMs: number },
): Promise<{ peers: number; ageMs: number; fault: string | undefined } | undefined> {
  let rest: Buffer = Buffer.alloc(0)
  let ageMs = -1
  let peers = 0
  let ended = false
  try {
    for await (const chunk of createReadStream(file, { highWaterMark: writeBytes })) {
      rest = Buffer.concat([rest, chunk as Buffer])
      if (ageMs < 0) {
        if (rest.length < headBytes) continue
        if (!rest.subarray(0, magic.length).equals(magic))
          return { peers, ageMs, fault: 'it is not a snapshot of this version' }
        const savedAtMs = rest.readDoubleBE(magic.length)
        if (!Number.isFinite(savedAtMs)) return { peers, ageMs, fault: 'it does not say when it was saved' }
        // The clock may have been put back since.
        ageMs = Math.max(0, nowMs - savedAtMs)
        rest = rest.subarray(headBytes)
      }
      while (rest.length >= frameHeadBytes) {
        const length = rest.readUInt32BE(0)
        if (length < 1 || length > frameBytesMax)
          return { peers, ageMs, fault: 'a frame has no right length' }
        if (rest.length < frameHeadBytes + length) break
        const payload = rest.subarray(frameHeadBytes, frameHeadBytes + length)
        if (crc32(payload) !== rest.readUInt32BE(4)) return { peers, ageMs, fault: 'a checksum is wrong' }
        rest = rest.subarray(frameHeadBytes + length)
        if (payload[0] === kinds.end) ended = true
        else peers += restoreFrame(store, payload, ageMs, topology)
        await new Promise((resolve) => setImmediate(resolve))
      }
    }
  } catch (error) {
    if (isMissing(error)) return undefined
    return { peers, ageMs, fault: error instanceof Error ? error.message : String(error) }
  }
  return { peers, ageMs, fault: ended ? undefined : 'it was cut short' }
}

function restoreFrame(store: MemoryPeerStore, payload: Buffer, ageMs: number, topology: Topology): number {
  const kind = payload[0]
  if (kind === kinds.swarms) {
    for (let at = 1; at + swarmBytes <= payload.length; at += swarmBytes)
      store.restoreDownloaded(infoHashFromBytes(payload.subarray(at, at + 20)), payload.readUInt32BE(at + 20))
    return 0
  }
  const family: Family | undefined = kind === 4 ? 4 : kind === 6 ? 6 : undefined
  if (family === undefined || ageMs > ageMaxMs) return 0
  const addressBytes = family === 4 ? 4 : 16
  const recordBytes = peerFieldsBytes + addressBytes + 2
  let restored = 0
  for (let at = 1; at + recordBytes <= payload.length; at += recordBytes) {
    const place = payload.readUInt32BE(at + 23)
    const addressAt = at + peerFieldsBytes
    if (!isLeafPlace(place)) continue
    const done = store.restore({
      infoHash: infoHashFromBytes(payload.subarray(at, at + 20)),
      kind: (payload[at + 20] === 0 ? 0 : 1) satisfies Kind,
      lifeSeconds: Math.max(graceSeconds, payload.readUInt16BE(at + 21) - Math.round(ageMs / 1000)),
      place,
      ancestors: topology.ancestorsOf(place),
      peerId: payload.subarray(at + 27, at + 47),
      source: { family, bytes: payload.subarray(addressAt, addressAt + addressBytes) },
      port: payload.readUInt16BE(addressAt + addressBytes),
    })
    if (done) restored++
  }
  return restored
}

/** The frames of a snapshot, each taken under the lock, and written where `room` says. */
function* frames(store: MemoryPeerStore, room: () => Buffer): Generator<{ frame: Buffer; records: number }> {
  for (const family of [4, 6] as const) {
    for (let from = 0, more = true; more; from += peersPerFrame) {
      const part = store.locked(({ families, swarms }) => {
        more = from + peersPerFrame < families[family].touched
        return writePeers(room(), families[family], swarms, family, { from, nowTick: store.nowTick() })
      })
      if (part.records > 0) yield part
    }
  }
  for (let from = 0, more = true; more; from += peersPerFrame) {
    const frame = store.locked(({ swarms }) => {
      more = from + peersPerFrame < swarms.touched
      return writeSwarms(room(), swarms, from)
    })
    if (frame) yield { frame, records: 0 }
  }
  yield { frame: sealed(begin(room(), kinds.end), frameHeadBytes + 1), records: 0 }
}

function writePeers(
  frame: Buffer,
  peers: FamilySwarms,
  swarms: SwarmTable,
  family: Family,
  { from, nowTick }: { from: number; nowTick: number },
): { frame: Buffer; records: number } {
  begin(frame, family)
  let at = frameHeadBytes + 1
  let records = 0
  for (let handle = from; handle < Math.min(from + peersPerFrame, peers.touched); handle++) {
    if (!peers.isUsed(handle)) continue
    const swarm = peers.swarmOf(handle)
    for (let i = 0; i < 5; i++) frame.writeUInt32BE(swarms.infoHashes[swarm * 5 + i] ?? 0, at + 4 * i)
    frame[at + 20] = peers.kindOf(handle)
    // Whoever is overdue has nothing left.
    frame.writeUInt16BE(Math.max(0, peers.expiryTick(handle) - nowTick), at + 21)
    frame.writeUInt32BE(peers.placeOf(handle), at + 23)
    frame.set(peers.peerIdOf(handle), at + 27)
    frame.set(peers.endpointOf(handle), at + peerFieldsBytes)
    at += peerFieldsBytes + peers.endpointBytes
    records++
  }
  return { frame: sealed(frame, at), records }
}

function writeSwarms(frame: Buffer, swarms: SwarmTable, from: number): Buffer | undefined {
  begin(frame, kinds.swarms)
  let at = frameHeadBytes + 1
  for (let swarm = from; swarm < Math.min(from + peersPerFrame, swarms.touched); swarm++) {
    const downloaded = swarms.downloaded(swarm)
    if (downloaded === 0) continue
    for (let i = 0; i < 5; i++) frame.writeUInt32BE(swarms.infoHashes[swarm * 5 + i] ?? 0, at + 4 * i)
    frame.writeUInt32BE(downloaded, at + 20)
    at += swarmBytes
  }
  return at > frameHeadBytes + 1 ? sealed(frame, at) : undefined
}

function head(nowMs: number): Buffer {
  const bytes = Buffer.alloc(headBytes)
  magic.copy(bytes)
  bytes.writeDoubleBE(nowMs, magic.length)
  return bytes
}

function begin(frame: Buffer, kind: number): Buffer {
  frame[frameHeadBytes] = kind
  return frame
}

/** Cuts a frame to what was written, and puts its length and checksum before it. */
function sealed(frame: Buffer, end: number): Buffer {
  frame.writeUInt32BE(end - frameHeadBytes, 0)
  frame.writeUInt32BE(crc32(frame.subarray(frameHeadBytes, end)), 4)
  return frame.subarray(0, end)
}

import type { RedisConnection } from '../../redis/connection.ts'
import type { PeerSample, StoreAnnounce } from '../peer-store.ts'
import type { Plan } from '../selection.ts'
import type { PlaceId } from '../topology.ts'
import { isLeafPlace } from '../topology.ts'
import type { Found } from './announce-call.ts'
import type { ListRow, NodeCounts, Stretch } from './stretches.ts'
import {
  blockField,
  drawRuns,
  drawStretches,
  entryBytes,
  fieldBytes,
  isLopsided,
  listOf,
  nodeBlock,
  nodeField,
  placeBlock,
} from './stretches.ts'

/** Of a node with more children so many are looked at, at random. */
const childrenMax = 256
/** Fields in one command. */
const fieldsMax = 1024
/** The first list of a node's blocks: its children that have peers. */
const childrenList = 0

/** Reads of a swarm's hash what an announce did not bring: seldom more than none. */
export interface Look {
  /** What a plan wants of these nodes; `closely` finds it even where nearly all are of the announcer's own branch. */
  more(
    key: string,
    announce: StoreAnnounce,
    nodes: readonly NodeCounts[],
    plan: Plan,
    closely: boolean,
  ): Promise<Found[]>
  /** Fills in the peer_ids of a sample. */
  peerIds(key: string, peers: PeerSample): Promise<void>
}

export function createLook(connection: RedisConnection, random: () => number): Look {
  const read = async (key: string, fields: readonly Buffer[]): Promise<(Buffer | null)[]> => {
    const values: (Buffer | null)[] = []
    for (let from = 0; from < fields.length; from += fieldsMax)
      values.push(
        ...((await connection.call(
          'HMGET',
          key,
          ...fields.slice(from, from + fieldsMax),
        )) as (Buffer | null)[]),
      )
    return values
  }

  const readStretches = async (
    key: string,
    stretches: readonly Stretch[],
    isMixed: boolean,
  ): Promise<Found[]> => {
    const values = await read(
      key,
      stretches.map(({ node, list, block }) => nameOfBlock(node, list, block)),
    )
    return stretches.flatMap(({ level, list, from, to }, i) => {
      const bytes = values[i]
      const size = entryBytes(list)
      const entries = bytes ? Math.min(to, bytes.length / size) - from : 0
      return bytes && entries > 0
        ? [{ level, list, bytes, at: from * size, entries, isMixed: isMixed && level > 0 }]
        : []
    })
  }

  /** Of a level, by the children of its node other than the announcer's branch. */
  const byChildren = async (
    key: string,
    {
      node,
      level,
      list,
      own,
      children,
    }: { node: PlaceId; level: number; list: number; own: PlaceId; children: number },
    want: number,
  ): Promise<Found[]> => {
    const from = Math.floor(random() * Math.max(0, children - childrenMax + 1))
    const blocks: Buffer[] = []
    for (
      let at = from;
      at < Math.min(children, from + childrenMax);
      at = (Math.floor(at / nodeBlock) + 1) * nodeBlock
    )
      blocks.push(nameOfBlock(node, childrenList, Math.floor(at / nodeBlock)))
    const ids: PlaceId[] = []
    for (const block of await read(key, blocks))
      for (let at = 0; block && at + 4 <= block.length; at += 4)
        if (block.readUInt32LE(at) !== own) ids.push(block.readUInt32LE(at))
    const values = await read(
      key,
      ids.map((id) => {
        const field = Buffer.alloc(fieldBytes.node)
        nodeField(id, field, 0)
        return field
      }),
    )
    const rows: ListRow[] = ids.map((id, i) => ({
      level,
      node: id,
      list,
      length: values[i]?.readUInt32LE(4 * (list - 1)) ?? 0,
      blockSize: isLeafPlace(id) ? placeBlock : nodeBlock,
    }))
    const stretches: Stretch[] = []
    drawRuns(stretches, rows, { want, run: 1, wholeMax: want, random })
    return readStretches(key, stretches, false)
  }

  return {
    more: async (key, announce, nodes, plan, closely) => {
      const found = await readStretches(
        key,
        drawStretches(announce, nodes, plan, { thorough: true, random }),
        true,
      )
      for (const [i, { node }] of announce.ancestors.entries()) {
        const level = i + 1
        for (const family of [4, 6] as const)
          for (const kind of [0, 1] as const) {
            const list = listOf(family, kind)
            const want = (kind === 0 ? plan.seeders : plan.leechers)[level] ?? 0
            const all = nodes[level]?.peers[list - 1] ?? 0
            const there = all - (nodes[i]?.peers[list - 1] ?? 0)
            if (want === 0 || there <= 0 || (!closely && !isLopsided(all, there))) continue
            const own = i === 0 ? announce.place : (announce.ancestors[i - 1]?.node ?? 0)
            const children = nodes[level]?.children ?? 0
            for (let at = found.length; at-- > 0;)
              if (found[at]?.level === level && found[at]?.list === list) found.splice(at, 1)
            found.push(...(await byChildren(key, { node, level, list, own, children }, want)))
          }
      }
      return found
    },
    peerIds: async (key, peers) => {
      const fields = ([4, 6] as const).flatMap((family) => {
        const size = family === 4 ? 6 : 18
        return Array.from({ length: peers.lengths[family] }, (_, i) =>
          Buffer.from(peers.compact[family].subarray(i * size, (i + 1) * size)),
        )
      })
      if (fields.length === 0) return
      const records = await read(key, fields)
      for (const [i, record] of records.entries()) {
        const at = i - peers.lengths[4]
        // Whoever has gone in between keeps the zeros.
        if (record) peers.peerIds[at < 0 ? 4 : 6].set(record.subarray(-20), (at < 0 ? i : at) * 20)
      }
    },
  }
}

function nameOfBlock(node: PlaceId, list: number, block: number): Buffer {
  const field = Buffer.alloc(fieldBytes.block)
  blockField(node, list, block, field, 0)
  return field
}

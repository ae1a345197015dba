import type { Family } from '../../../lib/protocol/address.ts'
import type { StoreAnnounce } from '../peer-store.ts'
import type { Plan } from '../selection.ts'
import type { PlaceId } from '../topology.ts'

/** Entries of a block of a place's lists, and of those of nodes above places, as scripts/swarm.lua has it. */
export const placeBlock = 64
export const nodeBlock = 16
/** Bytes of the names of fields in a swarm's hash. */
export const fieldBytes = { node: 5, block: 9 } as const

/** What is known of a node in a swarm: peers of each list (seeders and leechers of IPv4, then of IPv6), and children that have peers. */
export interface NodeCounts {
  readonly peers: readonly [number, number, number, number]
  readonly children: number
}

export const noCounts: NodeCounts = { peers: [0, 0, 0, 0], children: 0 }

/** A part of one block of a list. Lists of a node: 1 seeders, 2 leechers of IPv4; 3 and 4 of IPv6. */
export interface Stretch {
  readonly level: number
  readonly node: PlaceId
  readonly list: number
  readonly block: number
  /** Entries of the block: from this one on, and before that one. */
  readonly from: number
  readonly to: number
}

/** How many of whom are wanted as candidates. */
export type Wants = Pick<Plan, 'rack' | 'seeders' | 'leechers'>

/** A place of so few is taken as a whole. */
const nearWholeMax = 2 * placeBlock
/** Of peers further away so many are taken side by side, since each block has its price; in a large swarm there are hundreds of such groups. */
const farRun = 4
/** Of so few at a distance all are looked at. */
const farWholeMax = 2 * nodeBlock
/** Where fewer than one in this many of a node is of another branch than the announcer's, runs find them too rarely: its children are looked at. */
const lopsidedFrom = 16

/**
 * Draws what to look at, so that the wanted numbers of each level are surely among it, or nearly so: stretches of lists, whose lengths are
 * taken to be `nodes`. Each peer of a level is as likely to be in them as any other.
 */
export function drawStretches(
  { place, ancestors, source, ownFamilyOnly }: StoreAnnounce,
  nodes: readonly NodeCounts[],
  wants: Wants,
  { thorough, random }: { readonly thorough: boolean; readonly random: () => number },
): Stretch[] {
  const stretches: Stretch[] = []
  const count = (level: number, list: number) => nodes[level]?.peers[list - 1] ?? 0
  for (const family of ownFamilyOnly ? [source.family] : bothFamilies) {
    const seeders = listOf(family, 0)
    const leechers = seeders + 1
    if (count(ancestors.length, seeders) + count(ancestors.length, leechers) === 0) continue
    const near = (lists: readonly number[], want: number) => {
      if (want <= 0) return
      const rows = lists.map((list) => ({
        level: 0,
        node: place,
        list,
        length: count(0, list),
        blockSize: placeBlock,
      }))
      const total = rows.reduce((sum, { length }) => sum + length, 0)
      // One more, since the announcer may be among them.
      const runs = total >= 8 * want ? 4 : total >= 4 * want ? 2 : 1
      drawRuns(stretches, rows, {
        want: want + 1,
        run: Math.ceil((want + 1) / runs),
        wholeMax: nearWholeMax,
        random,
      })
    }
    near([seeders, leechers], wants.rack)
    near([seeders], wants.seeders[0] ?? 0)
    near([leechers], wants.leechers[0] ?? 0)
    for (const [i, { node }] of ancestors.entries()) {
      const level = i + 1
      for (const list of [seeders, leechers]) {
        const want = (list === seeders ? wants.seeders : wants.leechers)[level] ?? 0
        const all = count(level, list)
        const there = all - count(level - 1, list)
        if (want <= 0 || there <= 0) continue
        if (isLopsided(all, there)) continue
        const share = all / there
        // What is of the own branch is left out; that may be more or less than its share of what was drawn.
        const spare = Math.ceil(1.3 * Math.sqrt(farRun * want * (1 - 1 / share)))
        const aim = thorough ? 3 * (want + spare) + 8 : want + spare
        drawRuns(stretches, [{ level, node, list, length: all, blockSize: nodeBlock }], {
          want: Math.ceil(aim * share),
          run: farRun * Math.ceil(share),
          wholeMax: farWholeMax,
          random,
        })
      }
    }
  }
  return stretches
}

/** Whether what is there is lost among the announcer's own branch. */
export function isLopsided(all: number, there: number): boolean {
  return all > farWholeMax && there * lopsidedFrom < all
}

export interface ListRow {
  readonly level: number
  readonly node: PlaceId
  readonly list: number
  readonly length: number
  readonly blockSize: number
}

/**
 * Takes `want` of lists that stand in one row (or somewhat more), in runs of `run`: each in a part of its own, and all moved round by one
 * random number. So nobody comes twice, and each is as likely as any other. A row of up to `wholeMax`, or of which most are wanted, is taken as
 * it is, to the ends of its blocks: whoever joined since is met too.
 */
export function drawRuns(
  stretches: Stretch[],
  rows: readonly ListRow[],
  { want, run, wholeMax, random }: { want: number; run: number; wholeMax: number; random: () => number },
): void {
  let total = 0
  for (const { length } of rows) total += length
  if (total <= wholeMax || want * 2 >= total) {
    for (const { level, node, list, length, blockSize } of rows)
      for (let block = 0; block * blockSize < length; block++)
        stretches.push({ level, node, list, block, from: 0, to: blockSize })
    return
  }
  let runs = Math.ceil(want / run)
  let part = Math.floor(total / runs)
  let length = run
  if (part < run) {
    runs = 1
    part = total
    length = want
  }
  const start = Math.floor(random() * total)
  for (let i = 0; i < runs; i++) {
    const from = (start + i * part + Math.floor(random() * (part - length + 1))) % total
    const before = Math.min(length, total - from)
    take(stretches, rows, from, before)
    take(stretches, rows, 0, length - before)
  }
}

function take(stretches: Stretch[], rows: readonly ListRow[], from: number, length: number): void {
  let skipped = from
  let left = length
  for (const { level, node, list, length: there, blockSize } of rows) {
    if (left <= 0) return
    if (skipped >= there) {
      skipped -= there
      continue
    }
    let index = skipped
    const end = Math.min(there, skipped + left)
    left -= end - index
    skipped = 0
    while (index < end) {
      const block = Math.floor(index / blockSize)
      const to = Math.min(end, (block + 1) * blockSize)
      stretches.push({
        level,
        node,
        list,
        block,
        from: index - block * blockSize,
        to: to - block * blockSize,
      })
      index = to
    }
  }
}

/** The list of a kind, 0 seeders or 1 leechers. */
export function listOf(family: Family, kind: 0 | 1): number {
  return (family === 4 ? 1 : 3) + kind
}

export function familyOf(list: number): Family {
  return list <= 2 ? 4 : 6
}

/** An endpoint and 4 bytes more. */
export function entryBytes(list: number): number {
  return list <= 2 ? 10 : 22
}

/** Writes the name of a node's field. */
export function nodeField(node: PlaceId, bytes: Buffer, at: number): void {
  bytes[at] = 0x6e
  bytes.writeUInt32LE(node, at + 1)
}

/** Writes the name of a block's field. */
export function blockField(node: PlaceId, list: number, block: number, bytes: Buffer, at: number): void {
  bytes[at] = 0x62
  bytes.writeUInt32LE(node, at + 1)
  bytes[at + 5] = list
  bytes.writeUIntLE(block, at + 6, 3)
}

const bothFamilies: readonly Family[] = [4, 6]

import { randomUUID } from 'node:crypto'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../../lib/protocol/scrape.ts'
import { RedisRefused, RedisUnavailable } from '../../redis/connection.ts'
import type { RedisConnection } from '../../redis/connection.ts'
import { readScript } from '../../redis/script-file.ts'
import type { StoreTotals } from '../peer-store.ts'
import type { SwarmList } from './swarm-list.ts'
import { partCount } from './swarm-list.ts'

/** How often totals are read, and swept swarms are counted: how old totals are, where there are no more than `sweptPerTurnMax` swarms. */
const turnMs = 1000
/** Swarms that are looked at in a turn: some 2 % of Redis' time. Of more, each is looked at every few turns. */
const sweptPerTurnMax = 2000
/** How many are asked for at once, so that an announce never waits for more than those. */
const sweptAtOnce = 64
/** Another server takes over when the one that held the lease has been silent for so long. */
const leaseMs = 5000
const totalsTtlSeconds = 3600

const leaseScript = readScript(new URL('./scripts/lease.lua', import.meta.url))

export type Totals = Omit<StoreTotals, 'refused'>

export interface Housekeeping extends AsyncDisposable {
  /** As the server that keeps house last counted them. */
  totals(): Totals
  /** Takes a turn now. @throws RedisUnavailable, RedisRefused */
  turn(): Promise<void>
}

/**
 * Looks after swarms to which nobody announces, counts all, and takes those that are over out of the list: one server at a time, by a
 * lease, for all. All read what it counted.
 */
export function startHousekeeping({
  connection,
  list,
  sweep,
}: {
  connection: RedisConnection
  list: SwarmList
  /** Counts of a swarm, without those who are due; undefined where there is none. */
  sweep: (infoHash: InfoHash) => Promise<SwarmCounts | undefined>
}): Housekeeping {
  const leaseKey = `${connection.keyPrefix}housekeeping`
  const totalsKey = `${connection.keyPrefix}totals`
  const holder = randomUUID()
  let totals: Totals = noTotals
  let parts: (Totals | undefined)[] = new Array<undefined>(partCount).fill(undefined)
  let next = 0
  let holds = false
  let ended = false

  const sweepPart = async (index: number): Promise<number> => {
    const swarms = await list.part(index)
    const sum = { swarms: 0, seeders: 0, leechers: 0 }
    for (let from = 0; from < swarms.length; from += sweptAtOnce)
      await Promise.all(
        swarms.slice(from, from + sweptAtOnce).map(async (swarm) => {
          const counts = await sweep(swarm.infoHash)
          if (!counts) return list.remove(swarm)
          sum.swarms++
          sum.seeders += counts.complete
          sum.leechers += counts.incomplete
        }),
      )
    parts[index] = sum
    return swarms.length
  }

  const keepHouse = async () => {
    let swept = 0
    for (let turned = 0; turned < partCount && swept < sweptPerTurnMax && !ended; turned++) {
      swept += await sweepPart(next)
      next = (next + 1) % partCount
    }
    // Whoever takes over counts all before it says anything.
    if (parts.includes(undefined)) return
    const all = { ...noTotals }
    for (const part of parts) {
      all.swarms += part?.swarms ?? 0
      all.seeders += part?.seeders ?? 0
      all.leechers += part?.leechers ?? 0
    }
    await connection.call('SET', totalsKey, JSON.stringify(all), 'EX', totalsTtlSeconds)
  }

  const turn = async () => {
    const had = holds
    holds = false
    holds = (await connection.run(leaseScript, [leaseKey], [holder, leaseMs])) === 1
    if (holds && !had) parts = new Array<undefined>(partCount).fill(undefined)
    if (holds) await keepHouse()
    totals = parseTotals(await connection.call('GET', totalsKey))
  }

  let underWay: Promise<void> | undefined
  const timer = setInterval(() => {
    underWay ??= turn()
      .catch((error: unknown) => {
        // Redis tells of its troubles itself, and the next turn comes.
        if (!(error instanceof RedisUnavailable || error instanceof RedisRefused)) throw error
      })
      .finally(() => (underWay = undefined))
  }, turnMs)
  timer.unref()

  return {
    totals: () => totals,
    turn,
    [Symbol.asyncDispose]: async () => {
      ended = true
      clearInterval(timer)
      await underWay
      if (holds) await connection.run(leaseScript, [leaseKey], [holder, 0]).catch(() => undefined)
    },
  }
}

const noTotals = { swarms: 0, seeders: 0, leechers: 0 }

function parseTotals(text: unknown): Totals {
  if (!Buffer.isBuffer(text)) return noTotals
  return JSON.parse(text.toString()) as Totals
}

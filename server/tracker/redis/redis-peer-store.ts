import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { infoHashToHex } from '../../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../../lib/protocol/scrape.ts'
import type { RedisConnection } from '../../redis/connection.ts'
import { RedisRefused, RedisUnavailable } from '../../redis/connection.ts'
import { readScript } from '../../redis/script-file.ts'
import type { LevelCounts, PeerStore, StoreAnnounce, StoreReply } from '../peer-store.ts'
import { PeerSample } from '../peer-store.ts'
import type { AnnounceAnswer, AnnounceCall } from './announce-call.ts'
import { endpointOf, modes, parseAnswer, rankOf, writeRequest, writeStretches } from './announce-call.ts'
import type { SwarmHints } from './hints.ts'
import { createHints, guessOf, rankAmong, remember } from './hints.ts'
import { startHousekeeping } from './housekeeping.ts'
import { createLook } from './look.ts'
import { pickCandidates } from './pick-candidates.ts'
import type { Stretch } from './stretches.ts'
import { drawStretches, noCounts } from './stretches.ts'
import { tellStop } from './stops.ts'
import { openSwarmList, partCount } from './swarm-list.ts'

export interface RedisPeerStoreOptions {
  /** Peers in a reply at most. */
  readonly sampleMax: number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  /** Milliseconds; undefined for the clock of Redis, by which servers agree whose own clocks differ. */
  readonly now?: (() => number) | undefined
  /**
   * What Redis comes to later than this after it was sent is not done any more: whoever announced has been answered otherwise, and what it
   * says may not be so any more. By a clock of ours that never goes back, milliseconds.
   */
  readonly deadline?: { readonly ms: number; readonly monotonic: () => number } | undefined
  /** Whether this store takes part in the housekeeping and knows totals: one of a process is enough. Default: true. */
  readonly housekeeping?: boolean | undefined
  /** Counts refused announces; in shared memory for all threads of a process. One word. */
  readonly refused?: Uint32Array | undefined
}

const swarm = readScript(new URL('./scripts/swarm.lua', import.meta.url))
const announceScript = readScript(new URL('./scripts/announce.lua', import.meta.url), swarm)
const sweepScript = readScript(new URL('./scripts/sweep.lua', import.meta.url), swarm)

/** As long as a peer of the memory store may live, nine hours: longer than two and a half of the longest intervals that make sense. */
const lifeMsMax = 32_766_000
/** A swarm's keys go two days after its last peer is due (scripts/swarm.lua); it is listed anew every so often, by whoever sees it. */
const listedAgainMs = 6 * 3_600_000
const keptMs = 2 * 86_400_000
/** How often candidates that were missing are looked for, after the call that records. */
const looksMax = 2
const listedAtOnce = 64

/**
 * Swarms in Redis, shared by all servers that use it (docs/decisions/0018). An announce is one script and one round trip. The interval
 * that a peer is given follows the counts that this server saw last of its swarm, and so may be as old as the announce before.
 *
 * `announce`, `scrape` and `swarms` throw RedisUnavailable where Redis cannot be asked.
 */
export function openRedisPeerStore(
  connection: RedisConnection,
  {
    sampleMax,
    random,
    now,
    deadline,
    housekeeping = true,
    refused = new Uint32Array(1),
  }: RedisPeerStoreOptions,
): PeerStore {
  const { keyPrefix } = connection
  const hints = createHints()
  const list = openSwarmList(connection)
  const pick = pickCandidates({ sampleMax, random })
  const look = createLook(connection, random)
  const keysOf = (infoHash: InfoHash): readonly [string, string, string] => {
    const key = `${keyPrefix}{${infoHashToHex(infoHash)}}`
    return [key, `${key}:due`, `${key}:gone`]
  }

  const sweep = async (infoHash: InfoHash): Promise<SwarmCounts | undefined> => {
    const answer = await connection.run(sweepScript, keysOf(infoHash), [now?.() ?? 0])
    if (!Buffer.isBuffer(answer)) return undefined
    const word = (i: number) => answer.readUInt32LE(4 * i)
    return { complete: word(0) + word(2), incomplete: word(1) + word(3), downloaded: word(6) }
  }
  const house = housekeeping ? startHousekeeping({ connection, list, sweep }) : undefined

  const hintsOf = (infoHash: InfoHash): SwarmHints => {
    const known = hints.get(infoHash)
    if (known) return known
    const fresh: SwarmHints = { counts: unknownSwarm, listedUntilMs: 0, nodes: new Map(), places: new Map() }
    hints.set(infoHash, fresh)
    return fresh
  }

  const ask = async (
    call: AnnounceCall,
    keys: readonly string[],
    endpoint: Buffer,
  ): Promise<AnnounceAnswer> => {
    const args = [endpoint, writeRequest(call), writeStretches(call.stretches)]
    const answer = await connection.run(announceScript, keys, args).catch((error: unknown) => {
      // Out of memory: peers that it knows go on, and others are answered.
      if (error instanceof RedisRefused && error.code === 'OOM' && call.mode === modes.record)
        return undefined
      throw error
    })
    if (answer === undefined) return ask({ ...call, mode: modes.recordKnown }, keys, endpoint)
    return parseAnswer(answer as Buffer, call.announce, call.stretches)
  }

  /** Asks with a deadline, by the clock of the Redis that has the swarm; once more where that has become another one. */
  const askInTime = async (
    call: AnnounceCall,
    known: SwarmHints,
    keys: readonly string[],
    endpoint: Buffer,
  ): Promise<AnnounceAnswer> => {
    if (!deadline) return ask(call, keys, endpoint)
    for (let isLast = false; ; isLast = true) {
      const sentMs = deadline.monotonic()
      const { aheadMs } = known
      const notAfterMs = aheadMs === undefined ? 0 : Math.ceil(sentMs + aheadMs + deadline.ms)
      const answer = await ask({ ...call, notAfterMs }, keys, endpoint)
      known.aheadMs = answer.nowMs - sentMs
      if (!answer.isTooLate) return answer
      if (isLast || deadline.monotonic() - sentMs > deadline.ms)
        throw new RedisUnavailable(`Redis came to an announce later than ${deadline.ms} ms after it was sent`)
    }
  }

  /** Tells the others that there is this swarm; nobody waits for it. */
  const enlist = (infoHash: InfoHash, known: SwarmHints) => {
    const nowMs = now?.() ?? Date.now()
    known.listedUntilMs = nowMs + listedAgainMs
    list.add(infoHash, nowMs + lifeMsMax + keptMs + listedAgainMs).catch(() => {
      known.listedUntilMs = 0
    })
  }

  const announce = async (request: StoreAnnounce): Promise<StoreReply> => {
    const { infoHash } = request
    const keys = keysOf(infoHash)
    const known = hintsOf(infoHash)
    const endpoint = endpointOf(request)
    const rank = rankOf(infoHash, request.place, endpoint)
    const stops = request.event === 'stopped'
    const guess = stops ? undefined : guessOf(known, request, rank)
    const answer = await askInTime(
      {
        mode: stops ? modes.stop : modes.record,
        announce: request,
        rank,
        lifeMs: stops
          ? 0
          : Math.min(lifeMsMax, Math.ceil(request.lifetimeMs(withSelf(known.counts, request)))),
        nowMs: Math.floor(now?.() ?? 0),
        notAfterMs: 0,
        stretches: guess
          ? drawStretches(request, guess.nodes, guess.wants, { thorough: false, random })
          : noStretches,
      },
      known,
      keys,
      endpoint,
    )
    const { nodes, isStored } = answer
    const counts = countsOf(answer)
    known.counts = counts
    if (stops) {
      tellStop(connection, infoHash, endpoint)
      return { counts, peers: new PeerSample(0) }
    }
    if (!isStored) {
      // What is told late may have been overtaken by a stop.
      if (request.belatedMs === undefined) Atomics.add(refused, 0, 1)
    } else if (answer.isNew || (now?.() ?? Date.now()) > known.listedUntilMs) enlist(infoHash, known)

    const gatewayRank = isStored && request.left !== 0 ? rankAmong(answer.ranks, rank) : 0
    const plan = request.choose({ counts, gatewayRank, levels: levelsOf(answer, request) })
    remember(known, request, answer, { plan, rank: gatewayRank })
    const input = { announce: request, endpoint, isStored, nodes, plan }
    let { peers, missing } = pick({ ...input, found: answer.found })
    for (let looks = 1; missing > 0 && looks <= looksMax; looks++) {
      const found = await look.more(keys[0], request, nodes, plan, looks === looksMax)
      ;({ peers, missing } = pick({ ...input, found }))
    }
    if (request.withPeerIds) await look.peerIds(keys[0], peers)
    return { counts, peers }
  }

  return {
    announce,
    scrape: async (infoHash) => (await sweep(infoHash)) ?? unknownSwarm,
    swarms: async function* () {
      for (let index = 0; index < partCount; index++) {
        const listed = await list.part(index)
        for (let from = 0; from < listed.length; from += listedAtOnce) {
          const part = await Promise.all(
            listed
              .slice(from, from + listedAtOnce)
              .map(async ({ infoHash }) => [infoHash, await sweep(infoHash)] as const),
          )
          yield part.flatMap(([infoHash, counts]) => (counts ? [[infoHash, counts] as const] : []))
        }
      }
    },
    totals: () => ({
      ...(house?.totals() ?? { swarms: 0, seeders: 0, leechers: 0 }),
      refused: refused[0] ?? 0,
    }),
    [Symbol.asyncDispose]: async () => {
      await house?.[Symbol.asyncDispose]()
    },
  }
}

const unknownSwarm: SwarmCounts = { complete: 0, incomplete: 0, downloaded: 0 }
const noStretches: readonly Stretch[] = []

/** Counts that include the announcer, as far as is known. */
function withSelf(counts: SwarmCounts, { left }: StoreAnnounce): SwarmCounts {
  const seeds = left === 0
  if ((seeds ? counts.complete : counts.incomplete) > 0) return counts
  return {
    complete: counts.complete + (seeds ? 1 : 0),
    incomplete: counts.incomplete + (seeds ? 0 : 1),
    downloaded: counts.downloaded,
  }
}

function countsOf({ nodes, downloaded }: AnnounceAnswer): SwarmCounts {
  const [seeders4, leechers4, seeders6, leechers6] = (nodes.at(-1) ?? noCounts).peers
  return { complete: seeders4 + seeders6, incomplete: leechers4 + leechers6, downloaded }
}

/** Peers by distance; the announcer itself is not counted. */
function levelsOf({ nodes, isStored }: AnnounceAnswer, announce: StoreAnnounce): LevelCounts[] {
  const { family } = announce.source
  const of4 = !announce.ownFamilyOnly || family === 4
  const of6 = !announce.ownFamilyOnly || family === 6
  let seeders = isStored && announce.left === 0 ? 1 : 0
  let leechers = isStored && announce.left !== 0 ? 1 : 0
  return nodes.map(({ peers: [seeders4, leechers4, seeders6, leechers6] }, i) => {
    const seedersHere = (of4 ? seeders4 : 0) + (of6 ? seeders6 : 0)
    const leechersHere = (of4 ? leechers4 : 0) + (of6 ? leechers6 : 0)
    const level = {
      distance: i === 0 ? 0 : (announce.ancestors[i - 1]?.distance ?? 0),
      seeders: seedersHere - seeders,
      leechers: leechersHere - leechers,
    }
    seeders = seedersHere
    leechers = leechersHere
    return level
  })
}

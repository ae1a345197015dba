import { infoHashToHex } from '../../../lib/protocol/infohash.ts'
import type { RedisConnection } from '../../redis/connection.ts'
import { RedisUnavailable } from '../../redis/connection.ts'
import { readScript } from '../../redis/script-file.ts'
import type { WebseedAsk, WebseedLease, WebseedPolicy, WebseedPolicyOptions } from '../webseed-policy.ts'
import { createWebseedPolicy, hostAdmission, isStandingStill, waves } from '../webseed-policy.ts'

/** Which range a host is done with, where that is no first piece of one. */
const noRange = -1
const anyRange = -2

const script = readScript(new URL('./scripts/webseed.lua', import.meta.url))

/**
 * The same policy for several servers: the leases of parts are in Redis, so that each piece of a new build leaves all of them together about once. How
 * many hosts a server seeds to, and how fast, is of each server alone. While Redis does not answer so are the leases.
 */
export function createSharedWebseedPolicy(
  redis: RedisConnection,
  options: WebseedPolicyOptions,
): { mayUse(ask: WebseedAsk): Promise<WebseedLease | undefined> } {
  const { leaseMs, now } = options
  const alone: WebseedPolicy = createWebseedPolicy(options)
  const admission = hostAdmission(options)
  const lease = async (ask: WebseedAsk): Promise<WebseedLease | undefined> => {
    const key = `${redis.keyPrefix}webseed:{${infoHashToHex(ask.infoHash)}}`
    const answer = await redis.run(
      script,
      [`${key}:parts`, `${key}:all:${ask.host}`],
      [
        ask.host,
        ask.pieceCount,
        ask.counts.complete > 0 ? 1 : 0,
        isStandingStill(ask) ? Math.round((ask.stalledSeconds ?? 0) * 1000) : -1,
        typeof ask.rangeDone === 'number' ? ask.rangeDone : ask.rangeDone ? anyRange : noRange,
        leaseMs,
        waves.doneMs,
        waves.patienceMs,
        waves.partsMax,
        waves.partPiecesMin,
        waves.firstHostsMax,
        waves.slowFactor,
        waves.slowMinMs,
        waves.partsTimedMin,
        waves.doneMinMs,
      ],
    )
    if (answer === null) return undefined
    const [firstPiece = 0, pieceCount = 0] = answer as number[]
    return { firstPiece, pieceCount }
  }
  return {
    mayUse: async (ask) => {
      if (!admission.admits(ask.host, now())) return undefined
      try {
        const given = await lease(ask)
        if (given) admission.admit(ask.host, now() + leaseMs)
        return given
      } catch (error) {
        if (error instanceof RedisUnavailable) return alone.mayUse(ask)
        throw error
      }
    },
  }
}

import type { RedisConnection } from './connection.ts'
import { RedisRefused } from './connection.ts'

/** How a Redis is configured, as far as it says. */
export interface RedisFitness {
  /** Why nothing should be kept there. */
  readonly faults: readonly string[]
  /** What would be lost, and what could not be found out. */
  readonly warnings: readonly string[]
}

/**
 * Asks Redis (of a Cluster every primary) whether it keeps what it is given: that it evicts nothing, and has it on disk.
 *
 * @throws RedisUnavailable
 */
export async function checkRedis(redis: RedisConnection): Promise<RedisFitness> {
  const faults = new Set<string>()
  const warnings = new Set<string>()
  const info = async (section: string) => (await redis.callEach('INFO', section)).map(readInfo)
  try {
    for (const { maxmemory_policy: policy } of await info('memory'))
      if (policy !== undefined && policy !== 'noeviction')
        faults.add(
          `maxmemory-policy is ${policy}: when memory is short, Redis would throw hosts, tokens and peers away; set it to noeviction`,
        )
    for (const { aof_enabled: isOn, aof_last_write_status: status } of await info('persistence')) {
      if (isOn === '0')
        warnings.add(
          'appendonly is no: what Redis has is gone when it ends, and the servers put back what they have copies of; set it to yes',
        )
      if (status !== undefined && status !== 'ok')
        warnings.add(`aof_last_write_status is ${status}: look at its disk`)
    }
  } catch (error) {
    if (!(error instanceof RedisRefused)) throw error
    warnings.add(
      `could not be asked for INFO, so nobody knows whether it keeps what it is given (${error.message})`,
    )
  }
  try {
    for (const answer of await redis.callEach('CONFIG', 'GET', 'appendfsync'))
      if (valueOf(answer) === 'no')
        warnings.add(
          'appendfsync is no: half a minute of writes is gone after a power loss; set it to everysec or always',
        )
  } catch (error) {
    if (!(error instanceof RedisRefused)) throw error
    // Managed services have no CONFIG; their manuals say what they keep.
    warnings.add('could not be asked for appendfsync: CONFIG is refused')
  }
  return { faults: [...faults], warnings: [...warnings] }
}

function readInfo(answer: unknown): Record<string, string | undefined> {
  return Object.fromEntries(
    (answer as Buffer)
      .toString()
      .split('\r\n')
      .flatMap((line) => {
        const [name, value] = line.split(':')
        return name === undefined || value === undefined ? [] : [[name, value]]
      }),
  )
}

/** Of a reply to CONFIG GET: name, value. */
function valueOf(answer: unknown): string | undefined {
  const [, value] = answer as (Buffer | undefined)[]
  return value?.toString()
}

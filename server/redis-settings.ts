import { readFile } from 'node:fs/promises'
import { ConfigError } from '../lib/runtime/config.ts'
import { readSecret } from '../lib/runtime/secret-file.ts'
import type { ServerConfig } from './config.ts'
import type { RedisSettings } from './redis/connection.ts'

/**
 * What server.yaml says of Redis, with what its files hold; undefined where it says nothing.
 *
 * @throws ConfigError, or Error naming the file that is missing or that others can read
 */
export async function readRedisSettings(
  { redis }: ServerConfig,
  environment: NodeJS.ProcessEnv,
): Promise<RedisSettings | undefined> {
  if (!redis) return undefined
  const secret = async (file: string | undefined) => (file === undefined ? undefined : readSecret(file))
  const pem = async (key: 'ca' | 'client_cert' | 'client_key') => {
    const file = redis[key]
    if (file === undefined) return undefined
    return readFile(file, 'utf8').catch((cause: unknown) => {
      throw new ConfigError([`redis.${key}: cannot read ${file}: ${(cause as Error).message}`], { cause })
    })
  }
  const { sentinel } = redis
  return {
    mode: redis.mode,
    addresses: redis.url.map(({ address }) => address),
    database: redis.url[0]?.database ?? 0,
    username: redis.username,
    password: (await secret(redis.password_file)) ?? environment['RACKSWARM_REDIS_PASSWORD'],
    sentinel: sentinel && {
      name: sentinel.name,
      username: sentinel.username,
      password: await secret(sentinel.password_file),
    },
    tls:
      redis.url[0]?.tls === true
        ? { ca: await pem('ca'), cert: await pem('client_cert'), key: await pem('client_key') }
        : undefined,
    keyPrefix: redis.key_prefix,
    connectTimeoutMs: redis.connect_timeout,
    commandTimeoutMs: redis.command_timeout,
    callsMax: redis.calls_max,
  }
}

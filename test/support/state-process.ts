// A server's part in a state in Redis, as a process that can be killed: its connection, and its copy.
import { createLog } from '../../lib/runtime/log.ts'
import { openRedis } from '../../server/redis/connection.ts'
import { openRedisStateStore } from '../../server/state/redis-state-store.ts'
import { redisSettings } from './redis.ts'

const { port, keyPrefix, file } = JSON.parse(process.argv[2] ?? '') as {
  port: number
  keyPrefix: string
  file: string
}
const deps = { random: Math.random, log: createLog('test', 'silent') }
const redis = openRedis(redisSettings(port, { keyPrefix }), deps)
await openRedisStateStore({ redis, file }, deps)
// Until it is killed.
setInterval(() => undefined, 60_000)

import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseConfig } from '../../../lib/runtime/config.ts'
import { createLog } from '../../../lib/runtime/log.ts'
import { ServerConfig } from '../../../server/config.ts'
import { checkRedis } from '../../../server/redis/check-redis.ts'
import type { RedisConnection } from '../../../server/redis/connection.ts'
import { openRedis } from '../../../server/redis/connection.ts'
import { readRedisSettings } from '../../../server/redis-settings.ts'
import { createAuthority } from '../../support/certificates.ts'
import { freePort } from '../../support/foreign.ts'
import { startRedis } from '../../support/redis.ts'

const deps = { random: Math.random, log: createLog('test', 'silent') }

async function directoryOf(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-redis-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

/** Connects as server.yaml says. */
async function connect(t: TestContext, section: string): Promise<RedisConnection> {
  const settings = await readRedisSettings(parseConfig(ServerConfig, `redis: { ${section} }`, 'test'), {})
  assert.ok(settings)
  const connection = openRedis(settings, deps)
  t.after(() => connection[Symbol.asyncDispose]())
  return connection
}

async function answers(connection: RedisConnection): Promise<boolean> {
  for (let tries = 0; tries < 100; tries++) {
    const pong = await connection.call('PING').catch(() => undefined)
    if (String(pong) === 'PONG') return true
    await sleep(20)
  }
  return false
}

test('Redis is reached as a user of its ACL, and where that one may not ask how it is set up, it is said', async (t) => {
  const directory = await directoryOf(t)
  const user = ['--user', 'rackswarm', 'on', '>swordfish', '~*', '&*', '+@all', '-config', '-info']
  await using redis = await startRedis(join(directory, 'data'), {
    options: [...user, '--user', 'default', 'off'],
  })
  const file = join(directory, 'password')
  await writeFile(file, 'swordfish\n', { mode: 0o600 })
  const at = `url: redis://127.0.0.1:${redis.port}, username: rackswarm`
  const connection = await connect(t, `${at}, password_file: ${file}`)
  assert.ok(await answers(connection))
  const { faults, warnings } = await checkRedis(connection)
  assert.deepEqual(faults, [])
  assert.match(warnings.join(), /could not be asked for INFO.*CONFIG is refused/)

  const other = join(directory, 'wrong')
  await writeFile(other, 'guess\n', { mode: 0o600 })
  const wrong = await connect(t, `${at}, password_file: ${other}`)
  assert.equal(await answers(wrong), false)
})

test('Redis is reached over TLS, with a certificate on both sides', async (t) => {
  const directory = await directoryOf(t)
  const authority = createAuthority('redis-authority')
  const file = async (name: string, pem: Buffer) => {
    const path = join(directory, name)
    await writeFile(path, pem, { mode: 0o600 })
    return path
  }
  const ca = await file('ca.pem', authority.cert)
  const [server, client] = [authority.issue('redis'), authority.issue('rackswarm')]
  const port = await freePort()
  const redis = await startRedis(join(directory, 'data'), {
    options: [
      ...['--tls-port', String(port), '--tls-ca-cert-file', ca, '--tls-auth-clients', 'yes'],
      ...[
        '--tls-cert-file',
        await file('cert.pem', server.cert),
        '--tls-key-file',
        await file('key.pem', server.key),
      ],
    ],
  })
  t.after(() => redis[Symbol.asyncDispose]())
  const at = `url: rediss://127.0.0.1:${port}, ca: ${ca}`
  const mine = `client_cert: ${await file('c.pem', client.cert)}, client_key: ${await file('k.pem', client.key)}`
  assert.ok(await answers(await connect(t, `${at}, ${mine}`)))
  assert.equal(await answers(await connect(t, at)), false)
})

test('Redis is reached over a unix socket', async (t) => {
  const directory = await directoryOf(t)
  const socket = join(directory, 'redis.sock')
  const redis = await startRedis(join(directory, 'data'), { options: ['--unixsocket', socket] })
  t.after(() => redis[Symbol.asyncDispose]())
  assert.ok(await answers(await connect(t, `url: unix://${socket}`)))
})

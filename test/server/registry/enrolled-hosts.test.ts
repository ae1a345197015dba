import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { silentLog } from '../../../lib/runtime/log.ts'
import { openRedis } from '../../../server/redis/connection.ts'
import { followEnrolledHosts } from '../../../server/registry/enrolled-hosts.ts'
import type { HostRecord } from '../../../server/registry/host-recall.ts'
import { openRedisStateStore } from '../../../server/state/redis-state-store.ts'
import { VersionConflict } from '../../../server/state/state-store.ts'
import { redisSettings, startRedis } from '../../support/redis.ts'

const record: HostRecord = {
  place: 'r1',
  repositories: ['*'],
  enrolledAt: '2026-01-01T00:00:00Z',
  address: '127.0.0.1',
  credentials: [],
  revoked: false,
}

const log = silentLog()

test('three servers that enrol at once enrol as many hosts as may be, to the last one, and no more', async (t) => {
  await using started = new AsyncDisposableStack()
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-hosts-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const { port } = started.use(await startRedis(join(directory, 'redis')))
  const hostsMax = 25
  const servers = await Promise.all(
    ['a', 'b', 'c'].map(async (name) => {
      const redis = started.use(openRedis(redisSettings(port), { random: Math.random, log }))
      const state = started.use(
        await openRedisStateStore({ redis, file: join(directory, `${name}.sqlite`) }, { log }),
      )
      const hosts = started.use(await followEnrolledHosts({ state, hostsMax, log }))
      return { name, state, hosts }
    }),
  )
  const [first] = servers
  assert.ok(first)
  const listed = async () => (await first.state.list('hosts/')).map(({ key }) => key.slice('hosts/'.length))
  // The same host twice at once is one.
  const twice = await Promise.allSettled([1, 2, 3].map(() => first.hosts.write('twin', record, 0)))
  assert.equal(twice.filter(({ status }) => status === 'fulfilled').length, 1)
  await first.state.delete('hosts/twin')
  for (let round = 0; round < 5; round++) {
    const outcomes = await Promise.all(
      servers.flatMap(({ name, hosts }) =>
        Array.from({ length: 20 }, async (_, i) => {
          const host = `${name}-${round}-${i}`
          return hosts.write(host, record, 0).then(
            () => host,
            (error: unknown) => (error as { code: string }).code,
          )
        }),
      ),
    )
    const written = outcomes.filter((outcome) => outcome !== 'TOO_MANY_HOSTS')
    assert.equal(written.length, hostsMax)
    assert.deepEqual(await listed(), written.sort())
    for (const { hosts } of servers)
      await until(() => {
        assert.throws(() => {
          hosts.checkRoom('one-more')
        }, /25 hosts are enrolled/)
      })
    const [again = ''] = written
    first.hosts.checkRoom(again)
    await first.hosts.write(again, record, 1)
    await assert.rejects(Promise.all([1, 2].map(() => first.hosts.write(again, record, 0))), VersionConflict)
    // Who is revoked makes room, at every server.
    for (const host of written) await first.state.put(`hosts/${host}`, { ...record, revoked: true })
    for (const host of written) await first.state.delete(`hosts/${host}`)
    for (const { hosts } of servers)
      await until(() => {
        hosts.checkRoom('one-more')
      })
  }
})

/** Until it does not throw. */
async function until(check: () => void, withinMs = 5000): Promise<void> {
  const end = performance.now() + withinMs
  for (;;)
    try {
      check()
      return
    } catch (error) {
      if (performance.now() > end) throw error
      await sleep(10)
    }
}

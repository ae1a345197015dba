import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cp, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { after, test } from 'node:test'
import { createLog } from '../../../lib/runtime/log.ts'
import type { RedisSettings } from '../../../server/redis/connection.ts'
import { openRedis, RedisUnavailable } from '../../../server/redis/connection.ts'
import { withLease } from '../../../server/state/lease.ts'
import { openRedisStateStore } from '../../../server/state/redis-state-store.ts'
import { openStateCopy } from '../../../server/state/state-copy.ts'
import type { StateChange, StateStore } from '../../../server/state/state-store.ts'
import { redisSettings, startCluster, startRedis, startSentinels } from '../../support/redis.ts'
import { startTcpProxy } from '../../support/tcp-proxy.ts'
import { until } from '../../support/until.ts'
import { stateStoreContract } from './state-store.contract.ts'

const lease = (holder: string) => ({ holder, ttlMs: 1000, waitMs: 3000, random: Math.random })

const deps = { random: Math.random, log: createLog('test', 'silent') }
const directory = await mkdtemp(join(tmpdir(), 'rackswarm-state-'))
const shared = await startRedis(join(directory, 'redis'))
after(async () => {
  await shared[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

/** A server's part in a state: its connection, its copy. */
async function open(
  name: string,
  {
    port = shared.port,
    keyPrefix = `${name}:`,
    refillPatienceMs,
    ...settings
  }: Partial<RedisSettings> & { port?: number; refillPatienceMs?: number } = {},
  signal?: AbortSignal,
) {
  const redis = openRedis(redisSettings(port, { keyPrefix, ...settings }), deps)
  const close = () => redis[Symbol.asyncDispose]()
  try {
    const file = join(directory, `${name}.sqlite`)
    const store = await openRedisStateStore({ redis, file, refillPatienceMs, signal }, deps)
    return {
      ...store,
      redis,
      [Symbol.asyncDispose]: async () => {
        await store[Symbol.asyncDispose]()
        await close()
      },
    }
  } catch (error) {
    await close()
    throw error
  }
}

/** Everything that is heard under a prefix. */
function listen(store: StateStore, prefix: string, signal: AbortSignal): StateChange[] {
  const heard: StateChange[] = []
  const changes = store.watch(prefix, signal)
  void (async () => {
    for await (const change of changes) heard.push(change)
  })()
  return heard
}

let stores = 0
stateStoreContract('Redis', async () => {
  const name = `contract-${++stores}`
  const store = await open(name)
  return {
    store,
    reopen: async () => {
      await store[Symbol.asyncDispose]()
      return open(name)
    },
  }
})

test('Redis: what one server changes another hears of at once and in order, once each, even while it does not listen', async (t) => {
  const redis = await startRedis(join(directory, 'watch'))
  t.after(() => redis[Symbol.asyncDispose]())
  const at = { port: redis.port, keyPrefix: 'x:' }
  await using one = await open('watch-1', at)
  await using two = await open('watch-2', at)
  const ending = new AbortController()
  const heard = listen(two, 'deny/', ending.signal)
  const versions = () => heard.map((change) => (change.kind === 'put' ? change.entry.version : 'gone'))
  const isHeard = async () => String(await redis.ask('PUBSUB', 'NUMSUB', 'x:{state}:changed')).endsWith(',2')
  await until('the first change is heard', isHeard)
  await one.put('deny/a', 1)
  const writtenAtMs = performance.now()
  await until('the change is heard', () => heard.length === 1)
  assert.ok(performance.now() - writtenAtMs < 500)

  // What is published while nobody listens is found in the log.
  await redis.ask('CLIENT', 'KILL', 'TYPE', 'pubsub')
  await one.put('deny/a', 2)
  await one.delete('deny/a')
  await one.put('deny/a', 3)
  await until('all changes are heard', () => heard.length >= 4)
  await two.put('deny/b', 1)
  await until('the last change is heard', () => heard.length >= 5)
  assert.deepEqual(versions(), [1, 2, 'gone', 1, 1])
  ending.abort()
})

test('Redis: a change log that no longer reaches back is made up for by a comparison', async () => {
  const at = { keyPrefix: 'trimmed:' }
  await using one = await open('trimmed-1', at)
  for (const key of ['deny/kept', 'deny/changed', 'deny/deleted']) await one.put(key, 1)
  await (await open('trimmed-2', at))[Symbol.asyncDispose]()
  await one.put('deny/changed', 2)
  await one.delete('deny/deleted')
  await one.put('deny/new', 1)
  await one.redis.call('XTRIM', 'trimmed:{state}:log', 'MAXLEN', '1')
  // What it has copied shows when it starts without Redis.
  await (await open('trimmed-2', at))[Symbol.asyncDispose]()
  await using alone = await open('trimmed-2', { ...at, port: 1 })
  assert.deepEqual(
    (await alone.list('deny/')).map(({ key, value, version }) => [key, value, version]),
    [
      ['deny/changed', 2, 2],
      ['deny/kept', 1, 1],
      ['deny/new', 1, 1],
    ],
  )
})

test('Redis: one that lost its memory is filled again from the copies, before anybody reads or writes', async (t) => {
  const redis = await startRedis(join(directory, 'lost'))
  t.after(() => redis[Symbol.asyncDispose]())
  const at = { port: redis.port, keyPrefix: 'x:' }
  await using one = await open('lost-1', at)
  await using two = await open('lost-2', at)
  for (let i = 0; i < 2500; i += 100)
    await Promise.all(Array.from({ length: 100 }, (_, j) => one.put(`hosts/${i + j}`, { i })))
  await two.put('deny/a', 1)
  await two.put('deny/a', 2)
  await two.put('deny/b', 1)
  await one.delete('deny/b')
  const before = await withLease(one, 'gc', lease('one'), async ({ token }) => Promise.resolve(token))
  const ending = new AbortController()
  const heard = listen(one, '', ending.signal)

  await redis.ask('FLUSHALL')
  assert.equal((await two.get('deny/a'))?.version, 2)
  assert.equal(await one.put('deny/a', 3, { ifVersion: 2 }), 3)
  assert.equal((await one.list('hosts/', { limit: 10_000 })).length, 2500)
  assert.equal(await two.get('deny/b'), undefined)
  const after = await withLease(two, 'gc', lease('two'), async ({ token }) => Promise.resolve(token))
  assert.ok(after > before, `token ${after} comes after ${before}`)
  assert.ok(one.losses.restored + two.losses.restored >= 2501)
  await until('both have seen the loss', () => one.losses.lost === 1 && two.losses.lost === 1)
  // Nothing was gone for those who watch.
  assert.deepEqual(
    heard.filter((change) => change.kind === 'delete' || !change.entry.key.startsWith('leases/')),
    [{ kind: 'put', entry: { key: 'deny/a', value: 3, version: 3 } }],
  )

  redis.kill('SIGKILL')
  await redis.ended
  await assert.rejects(one.put('deny/c', 1), RedisUnavailable)
  await using again = await startRedis(join(directory, 'lost'), { port: redis.port })
  await until('it can be written again', async () => one.put('deny/c', 1).then(Boolean, () => false))
  assert.equal(again.port, redis.port)
  assert.equal((await two.get('deny/a'))?.version, 3)
  ending.abort()
})

test('Redis: a server that was off while Redis lost its memory brings nothing back that was deleted', async () => {
  const at = { keyPrefix: 'stale:' }
  const one = await open('stale-1', at)
  const two = await open('stale-2', at)
  await one.put('bootstrap/a', 1)
  await one.put('bootstrap/b', 1)
  await until('the other one has both entries', async () => (await two.list('bootstrap/')).length === 2)
  await two[Symbol.asyncDispose]()
  await one.delete('bootstrap/a')
  const keys = (await one.redis.call('KEYS', 'stale:*')) as Buffer[]
  await one.redis.call('DEL', ...keys)
  assert.equal((await one.get('bootstrap/b'))?.version, 1)
  await using again = await open('stale-2', at)
  assert.deepEqual(
    (await again.list('')).map(({ key }) => key),
    ['bootstrap/b'],
  )
  assert.deepEqual({ ...again.losses }, { lost: 1, rewound: 0, restored: 0 })
  await one[Symbol.asyncDispose]()
})

/** Copies of one state that Redis has lost: the later one knows that `deny/old` was deleted and `deny/changed` changed. */
async function lostState(t: TestContext, name: string) {
  const redis = await startRedis(join(directory, name))
  t.after(() => redis[Symbol.asyncDispose]())
  const at = { port: redis.port, keyPrefix: 'x:' }
  const hosts = Array.from({ length: 6000 }, (_, i) => ({
    key: `hosts/${i}`,
    value: `{"i":${i}}`,
    version: 1,
  }))
  const write = async (
    which: string,
    number: number,
    rows: readonly { key: string; value: string; version: number }[],
  ) => {
    await using copy = await openStateCopy(join(directory, `${name}-${which}.sqlite`))
    await copy.apply([...hosts, ...rows], { generation: 'lost', number, nonce: 'n' })
  }
  await write('earlier', 7000, [
    { key: 'deny/old', value: '1', version: 1 },
    { key: 'deny/changed', value: '1', version: 1 },
  ])
  await write('later', 7002, [{ key: 'deny/changed', value: '2', version: 2 }])
  return {
    redis,
    at,
    open: (which: string, options = {}) => open(`${name}-${which}`, { ...at, ...options }),
    /** A server that is killed while it puts back what its copy has. */
    killHalfWay: async (which: string) => {
      await using slow = await startTcpProxy([{ port: redis.port }])
      slow.links[0]?.slow(150)
      const file = join(directory, `${name}-${which}.sqlite`)
      const server = spawn(
        process.execPath,
        [
          join(import.meta.dirname, '..', '..', 'support', 'state-process.ts'),
          JSON.stringify({ ...at, port: slow.port, file }),
        ],
        { stdio: ['ignore', 'ignore', 'inherit'] },
      )
      const exited = once(server, 'exit')
      await until('a part is there', async () => Number(await redis.ask('HLEN', 'x:{state}:values')) >= 1000)
      server.kill('SIGKILL')
      await exited
      const there = Number(await redis.ask('HLEN', 'x:{state}:values'))
      assert.ok(there >= 1000 && there < 6000, `${there} entries are there`)
      assert.equal(await redis.ask('EXISTS', 'x:{state}:generation'), 0)
    },
  }
}

/** That all is there which the later copy had, and nothing else. */
async function assertIsLater(store: StateStore): Promise<void> {
  assert.deepEqual(
    (await store.list('deny/')).map(({ key, value, version }) => [key, value, version]),
    [['deny/changed', 2, 2]],
  )
  assert.equal((await store.list('hosts/', { limit: 10_000 })).length, 6000)
  assert.equal((await store.list('', { limit: 10_000 })).length, 6001)
}

test('Redis: a server that was killed while it filled it again finishes that at its next start', async (t) => {
  const state = await lostState(t, 'half')
  await state.killHalfWay('later')
  await using again = await state.open('later')
  await assertIsLater(again)
  await using earlier = await state.open('earlier')
  await assertIsLater(earlier)
  assert.equal(await again.put('deny/changed', 3, { ifVersion: 2 }), 3)
})

test('Redis: what was half put back one that knows less leaves alone, and a new server too, until the first is there again', async (t) => {
  const state = await lostState(t, 'less')
  await state.killHalfWay('later')
  await using earlier = await state.open('earlier')
  assert.equal((await earlier.get('deny/old'))?.version, 1, 'its own copy is what it reads')
  await assert.rejects(earlier.put('deny/new', 1), RedisUnavailable)
  const ending = new AbortController()
  const heard = listen(earlier, 'deny/', ending.signal)
  const fresh = state.open('fresh')
  await using later = await state.open('later')
  await assertIsLater(later)
  await until('it is deleted', async () => (await earlier.get('deny/old')) === undefined)
  await assertIsLater(earlier)
  await assertIsLater(await fresh)
  await (await fresh)[Symbol.asyncDispose]()
  assert.deepEqual(heard.map((change) => (change.kind === 'put' ? change.entry : change.key)).sort(), [
    { key: 'deny/changed', value: 2, version: 2 },
    'deny/old',
  ])
  ending.abort()
})

test('Redis: what one that knows less has half put back one that knows more begins anew', async (t) => {
  const state = await lostState(t, 'more')
  await state.killHalfWay('earlier')
  assert.notEqual(await state.redis.ask('HGET', 'x:{state}:values', 'deny/old'), null)
  await using later = await state.open('later')
  await assertIsLater(later)
})

test('Redis: one that knows less goes on in the end where the other does not come back, and is told what it missed where it does', async (t) => {
  const state = await lostState(t, 'gone')
  await state.killHalfWay('later')
  await using earlier = await state.open('earlier', { refillPatienceMs: 1500 })
  await until('it can be written', async () => earlier.put('deny/new', 1).then(Boolean, () => false))
  assert.equal((await earlier.list('hosts/', { limit: 10_000 })).length, 6000)
  assert.equal((await earlier.get('deny/changed'))?.version, 2)
  await using later = await state.open('later')
  assert.equal((await later.get('deny/new'))?.version, 1)
  assert.equal((await later.get('deny/changed'))?.version, 2)
})

test('Redis: with an append-only file a restart loses nothing, and an older file is made up for', async (t) => {
  const place = join(directory, 'aof')
  const options = ['--appendonly', 'yes', '--appendfsync', 'always']
  let redis = await startRedis(place, { options })
  t.after(() => redis[Symbol.asyncDispose]())
  const at = { port: redis.port, keyPrefix: 'x:' }
  await using one = await open('aof', at)
  await Promise.all(Array.from({ length: 200 }, (_, i) => one.put(`hosts/${i}`, { i })))
  redis.kill('SIGKILL')
  await redis.ended
  redis = await startRedis(place, { options, port: redis.port })
  await until('it is up', () => one.redis.stats().isUp)
  assert.equal(await one.put('hosts/0', { i: 0 }), 2)
  assert.deepEqual(one.losses, { lost: 0, rewound: 0, restored: 0 })

  // What is written from here on is not in the file that the next start reads.
  redis.kill('SIGKILL')
  await redis.ended
  await cp(place, `${place}-older`, { recursive: true })
  redis = await startRedis(place, { options, port: redis.port })
  await until('it can be written again', async () => one.put('hosts/0', { i: 0 }).then(Boolean, () => false))
  await one.put('deny/a', 1)
  redis.kill('SIGKILL')
  await redis.ended
  redis = await startRedis(`${place}-older`, { options, port: redis.port })
  await until('it can be read again', async () => one.get('deny/a').then(Boolean, () => false))
  assert.equal((await one.get('hosts/0'))?.version, 3)
  assert.equal(one.losses.rewound, 1)
})

test('Redis: a server that starts while it is away reads from its copy; one without a copy waits', async (t) => {
  const place = join(directory, 'away')
  let redis = await startRedis(place)
  t.after(() => redis[Symbol.asyncDispose]())
  const at = { port: redis.port, keyPrefix: 'x:' }
  const first = await open('away', at)
  await first.put('deny/a', 1)
  await first[Symbol.asyncDispose]()
  redis.kill('SIGKILL')
  await redis.ended

  await using one = await open('away', at)
  assert.equal((await one.get('deny/a'))?.version, 1)
  assert.equal((await one.list('deny/')).length, 1)
  assert.match(one.fault() ?? '', /does not answer/)
  await assert.rejects(one.put('deny/b', 1), RedisUnavailable)
  const starting = new AbortController()
  const refused = assert.rejects(open('away-new', at, starting.signal), /enough/)
  starting.abort(new Error('enough'))
  await refused
  const second = open('away-new', at)

  redis = await startRedis(place, { port: redis.port })
  await using two = await second
  await until('the other one has the entry', async () => (await two.get('deny/a')) !== undefined)
  await until('it can be written again', async () => one.put('deny/b', 1).then(Boolean, () => false))
  assert.equal(one.fault(), undefined)
})

test('Redis: one that would throw things away is refused by the name of the setting', async () => {
  await using redis = await startRedis(join(directory, 'unfit'), {
    options: ['--maxmemory-policy', 'allkeys-lru'],
  })
  await assert.rejects(open('unfit', { port: redis.port }), /maxmemory-policy is allkeys-lru/)
})

test('Redis: the state in a Cluster lies in one slot, and is there again when its node is', async (t) => {
  const cluster = await startCluster(join(directory, 'cluster'), { options: ['--appendonly', 'yes'] })
  t.after(() => cluster[Symbol.asyncDispose]())
  const at: Partial<RedisSettings> = { ...cluster.settings, keyPrefix: 'x:' }
  await using one = await open('cluster-1', at)
  await using two = await open('cluster-2', at)
  const ending = new AbortController()
  const heard = listen(two, 'hosts/', ending.signal)
  assert.equal(await one.put('hosts/a', 1), 1)
  await until('the change is heard', () => heard.length === 1)
  assert.equal((await two.list('hosts/')).length, 1)

  const slot = Number(await cluster.nodes[0]?.ask('CLUSTER', 'KEYSLOT', 'x:{state}:values'))
  const holder = Math.floor(slot / Math.ceil(16384 / 3))
  cluster.nodes[holder]?.kill('SIGKILL')
  await until('it cannot be read', async () =>
    one.get('hosts/a').then(
      () => false,
      () => true,
    ),
  )
  await cluster.restart(holder)
  await cluster.whole()
  await until('it can be written again', async () => one.put('hosts/a', 2).then(Boolean, () => false))
  await until('the second change is heard', () => heard.length === 2)
  ending.abort()
})

test('Redis: a replica that was promoted has what a server was told is written', async (t) => {
  const group = await startSentinels(join(directory, 'sentinel'), { downAfterMs: 500 })
  t.after(() => group[Symbol.asyncDispose]())
  const at: Partial<RedisSettings> = { ...group.settings, keyPrefix: 'x:' }
  await using one = await open('sentinel-1', at)
  await using two = await open('sentinel-2', at)
  await one.put('deny/before', 1)
  // The replica hears nothing of what comes now.
  const [primary, replica] = group.servers
  replica?.kill('SIGSTOP')
  await one.put('deny/unheard', 1)
  primary?.kill('SIGKILL')
  replica?.kill('SIGCONT')
  await until(
    'it can be written after the promotion',
    async () => two.put('deny/after', 1).then(Boolean, () => false),
    { withinMs: 20_000 },
  )
  await until('the entry is there', async () => (await two.get('deny/unheard')) !== undefined)
  await until('the other one can write again', async () =>
    one.put('deny/again', 1).then(Boolean, () => false),
  )
  assert.equal((await one.list('deny/')).length, 4)
})

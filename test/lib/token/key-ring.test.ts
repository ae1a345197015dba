import assert from 'node:assert/strict'
import { generateKeyPairSync } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { infoHashFromHex } from '../../../lib/protocol/infohash.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import type { KeyChange } from '../../../lib/token/key-ring.ts'
import { readForeignKey } from '../../../lib/token/key-ring.ts'
import { openTokenAuthority } from '../../../lib/token/token-authority.ts'

const minute = 60_000
const day = 24 * 60 * minute
const toleranceMs = 2 * minute
const infoHash = infoHashFromHex('ab'.repeat(20))

test('a key is published before it signs, and verifies until the last of its tokens has expired', async (t) => {
  const { open, clock } = await setUp(t)
  const authority = await open()
  const states = () => authority.keys.list().map(({ state }) => state)
  const early = await mint(authority, 15 * minute)
  const last = await mint(authority, 30 * day)
  await authority.keys.rotate({ atOnce: false })
  assert.deepEqual(states(), ['active', 'next'])
  assert.equal(authority.jwks().keys.length, 2, 'the next one is published')
  clock.now += 10 * minute - 1
  await authority.keys.turnOver()
  const stillOld = await mint(authority, minute)
  assert.equal(stillOld.kid, early.kid)
  clock.now += 1
  await authority.keys.turnOver()
  assert.deepEqual(states(), ['retiring', 'active'])
  const fresh = await mint(authority, minute)
  assert.notEqual(fresh.kid, early.kid)
  for (const { token } of [last, fresh]) assert.equal(await faultOf(authority, token), undefined)
  clock.now = last.expiresAt.getTime() + toleranceMs - 1
  await authority.keys.turnOver()
  assert.equal(await faultOf(authority, last.token), undefined, 'to the last moment')
  // The mark of what it signed is set ahead by a week at most.
  clock.now += 8 * day
  await authority.keys.turnOver()
  assert.deepEqual(states(), ['active'])
  assert.equal(authority.jwks().keys.length, 1)
})

test('what was rotated is so after a restart; time that the server was away does not count as published', async (t) => {
  const { open, clock, directory } = await setUp(t)
  let first: string
  {
    await using authority = await open({ dispose: false })
    first = (await mint(authority, 30 * day)).kid
    await authority.keys.rotate({ atOnce: false })
  }
  clock.now += day
  {
    await using authority = await open({ dispose: false })
    await authority.keys.turnOver()
    assert.equal(authority.minter.kid, first)
    clock.now += 10 * minute
    await authority.keys.turnOver()
    assert.notEqual(authority.minter.kid, first)
  }
  await using authority = await open({ dispose: false })
  assert.notEqual(authority.minter.kid, first)
  assert.deepEqual(
    // Made within one millisecond.
    authority.keys
      .list()
      .map(({ state }) => state)
      .sort(),
    ['active', 'retiring'],
  )
  for (const file of await readdir(directory))
    assert.equal((await stat(join(directory, file))).mode & 0o777, 0o600, file)
})

test('a crash between the two halves of a rotation leaves one key that signs', async (t) => {
  const { open, clock, directory } = await setUp(t)
  let [old, fresh] = ['', '']
  {
    await using authority = await open({ dispose: false })
    old = (await mint(authority, day)).kid
    clock.now += minute
    fresh = (await authority.keys.rotate({ atOnce: true })).kid
  }
  const file = join(directory, `${old}.json`)
  const half = (await readFile(file, 'utf8')).replace('"retiring"', '"active"').replace(/"since".*\n/, '')
  await writeFile(file, half, { mode: 0o600 })
  const authority = await open()
  assert.equal(authority.minter.kid, fresh)
  await authority.keys.turnOver()
  assert.deepEqual(
    new Map(authority.keys.list().map(({ kid, state }) => [kid, state])),
    new Map([
      [old, 'retiring'],
      [fresh, 'active'],
    ]),
  )
})

test('a second rotation waits for the first, unless it is wanted at once', async (t) => {
  const { open } = await setUp(t)
  const authority = await open()
  const next = await authority.keys.rotate({ atOnce: false })
  await assert.rejects(authority.keys.rotate({ atOnce: false }), { code: 'ROTATION_UNDER_WAY' })
  assert.equal((await authority.keys.rotate({ atOnce: true })).kid, next.kid)
  assert.equal(authority.minter.kid, next.kid)
})

test('a key of a set age is followed by another one, and each step is told before it happens', async (t) => {
  const told: string[] = []
  let count = () => 0
  const { open, clock } = await setUp(t)
  const authority = await open({
    rotationMs: 30 * day,
    aroundChange: async ({ kind }, work) => {
      told.push(`${kind} ${count()}`)
      await work()
    },
  })
  count = () => authority.keys.list().length
  const first = authority.minter.kid
  clock.now += 30 * day - 11 * minute
  await authority.keys.turnOver()
  assert.equal(authority.keys.list().length, 1)
  clock.now += 2 * minute
  await authority.keys.turnOver()
  clock.now += 10 * minute
  await authority.keys.turnOver()
  assert.notEqual(authority.minter.kid, first)
  assert.deepEqual(
    told,
    ['create 0', 'create 1', 'activate 2', 'remove 2'],
    'the first one has signed nothing',
  )
})

test('a change that cannot be told does not happen', async (t) => {
  const { open, clock } = await setUp(t)
  let full = false
  const authority = await open({
    aroundChange: async (_change, work) => {
      if (full) throw new Error('the disk is full')
      await work()
    },
  })
  await authority.keys.rotate({ atOnce: false })
  const first = authority.minter.kid
  full = true
  clock.now += day
  await assert.rejects(authority.keys.turnOver(), /full/)
  assert.equal(authority.minter.kid, first)
  full = false
  await authority.keys.turnOver()
  assert.notEqual(authority.minter.kid, first)
})

test('revoking a key ends all that it signed, at once; another one signs then', async (t) => {
  const { open, directory } = await setUp(t)
  const authority = await open()
  const old = await mint(authority, day)
  assert.equal(await faultOf(authority, old.token), undefined)
  await authority.keys.revoke(old.kid)
  assert.equal(await faultOf(authority, old.token), 'unknown_key')
  assert.deepEqual(
    authority.jwks().keys.map(({ kid }) => kid),
    [authority.minter.kid],
  )
  assert.notEqual(authority.minter.kid, old.kid)
  assert.ok(!(await readdir(directory)).includes(`${old.kid}.json`))
  assert.equal(await faultOf(authority, (await mint(authority, day)).token), undefined)
  assert.equal(await authority.keys.revoke('nobody'), undefined)
})

test('a key is imported under its own name, verifies at once, and signs only if it may', async (t) => {
  const { open, clock } = await setUp(t)
  const first = await open({ dispose: false })
  const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey
  const text = rsa.export({ type: 'pkcs1', format: 'pem' })
  const { kid, state } = await first.keys.add(await readForeignKey(text, 'quay-1'), { verifyOnly: true })
  assert.deepEqual([kid, state], ['quay-1', 'retiring'])
  await assert.rejects(first.keys.add(await readForeignKey(text, undefined), { verifyOnly: false }), {
    code: 'KEY_EXISTS',
  })
  await assert.rejects(readForeignKey('nonsense', undefined), {
    code: 'BAD_KEY',
    message: /neither PEM nor a JWK/,
  })
  const own = JSON.stringify(generateKeyPairSync('ed25519').privateKey.export({ format: 'jwk' }))
  const next = await first.keys.add(await readForeignKey(own, undefined), { verifyOnly: false })
  clock.now += 10 * minute
  await first.keys.turnOver()
  assert.equal(first.minter.kid, next.kid)
  assert.equal(await faultOf(first, (await mint(first, minute)).token), undefined)
  await first[Symbol.asyncDispose]()
  const again = await open()
  assert.equal(again.minter.kid, next.kid)
  assert.ok(again.keys.keys.has('quay-1'))
})

test('a key file of an earlier version is read, and what it signed is taken to live long', async (t) => {
  const { open, clock, directory } = await setUp(t)
  const jwk = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey.export({ format: 'jwk' })
  const content = { algorithm: 'ES256', state: 'active', createdAt: new Date(clock.now).toISOString(), jwk }
  await writeFile(join(directory, 'old.json'), JSON.stringify(content), { mode: 0o600 })
  const authority = await open()
  const old = authority.minter.kid
  await authority.keys.rotate({ atOnce: true })
  clock.now += 9 * 365 * day
  await authority.keys.turnOver()
  assert.ok(authority.keys.keys.has(old))
})

async function setUp(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-key-ring-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const clock = { now: 1_800_000_000_000 }
  const open = async ({
    dispose = true,
    ...options
  }: {
    dispose?: boolean
    rotationMs?: number
    aroundChange?: (change: KeyChange, work: () => Promise<void>) => Promise<void>
  } = {}) => {
    const authority = await openTokenAuthority({
      keysDirectory: directory,
      algorithm: 'ES256',
      issuer: 'https://rackswarm.example.com',
      audience: 'https://rackswarm.example.com',
      clockToleranceMs: toleranceMs,
      now: () => clock.now,
      ...options,
    })
    if (dispose) t.after(() => authority[Symbol.asyncDispose]())
    return authority
  }
  return { directory, clock, open }
}

type Authority = Awaited<ReturnType<Awaited<ReturnType<typeof setUp>>['open']>>

async function mint({ minter }: Authority, ttlMs: number) {
  return minter.mintAnnounce({ infoHash, subject: 'a1', ttlMs })
}

async function faultOf({ verifier }: Authority, token: string): Promise<string | undefined> {
  try {
    await verifier.verify(token, 'announce')
    return undefined
  } catch (error) {
    if (error instanceof TokenError) return error.fault
    throw error
  }
}

import assert from 'node:assert/strict'
import { generateKeyPairSync, sign } from 'node:crypto'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { Worker } from 'node:worker_threads'
import { CompactSign } from 'jose'
import type { Ip } from '../../../lib/protocol/address.ts'
import { parseIp } from '../../../lib/protocol/address.ts'
import { TokenError } from '../../../lib/token/claims.ts'
import { createFairQueue } from '../../../lib/token/fair-queue.ts'
import { importVerificationKey } from '../../../lib/token/verification-key.ts'
import { checksMax, createVerifyPool, laneOf } from '../../../lib/token/verify-pool.ts'

test('signatures of each algorithm are told right from wrong as jose makes them, many at a time', async (t) => {
  const pool = startPool(t)
  const pairs = {
    ES256: generateKeyPairSync('ec', { namedCurve: 'P-256' }),
    Ed25519: generateKeyPairSync('ed25519'),
    RS256: generateKeyPairSync('rsa', { modulusLength: 2048 }),
  }
  const checks: Promise<readonly [boolean, boolean]>[] = []
  for (const [alg, { publicKey, privateKey }] of Object.entries(pairs)) {
    const key = importVerificationKey(publicKey.export({ format: 'jwk' }))
    for (let i = 0; i < 100; i++) {
      const good = await new CompactSign(Buffer.from(`payload ${i}`))
        .setProtectedHeader({ alg })
        .sign(privateKey)
      const [header, , signature] = good.split('.')
      const other = `${header ?? ''}.${Buffer.from(`payload ${i + 1}`).toString('base64url')}.${signature ?? ''}`
      const spoilt = [good, other, good.slice(0, -4), `${good}AAAA`, good.slice(0, good.lastIndexOf('.') + 1)]
      for (const [j, token] of spoilt.entries())
        checks.push(pool.verify({ token, key }).then((valid) => [valid, j === 0]))
    }
  }
  for (const [valid, wanted] of await Promise.all(checks)) assert.equal(valid, wanted)
  assert.equal(pool.waiting, 0)
})

test('a flood from one network is turned away beyond half of the queue, and keeps nobody else waiting', async (t) => {
  const pool = startPool(t)
  const { key, tokens } = makeTokens(20)
  const [signed, signature] = [tokens[0], tokens[1]].map((token) => token?.split('.') ?? [])
  const forged = [...(signed?.slice(0, 2) ?? []), signature?.[2] ?? ''].join('.')
  const flood = { valid: 0, invalid: 0, busy: 0 }
  const flooding = Array.from({ length: checksMax }, async (_, i) => {
    try {
      flood[
        (await pool.verify({ token: forged, key, from: ip(`10.1.1.${i % 256}`) })) ? 'valid' : 'invalid'
      ]++
    } catch (error) {
      assert.ok(error instanceof TokenError && error.fault === 'busy', String(error))
      flood.busy++
    }
  })
  await flooding[0]
  const before = flood.invalid
  const honest = await Promise.all(
    tokens.map((token, i) => pool.verify({ token, key, from: ip(`10.1.2.${i}`) })),
  )
  assert.ok(honest.every(Boolean))
  const waitedFor = flood.invalid - before
  assert.ok(waitedFor < 1000, `the honest waited for ${waitedFor} forged ones`)
  await Promise.all(flooding)
  assert.deepEqual(flood, { valid: 0, invalid: checksMax / 2, busy: checksMax / 2 })
})

test('the queue serves its lanes in turn, and leaves room for one that comes late', () => {
  const queue = createFairQueue<{ name: string }>(12)
  const push = (name: string, lane: number) => queue.push({ name }, lane)
  const pushed = (lane: number) => {
    let count = 0
    while (push(`${lane}`, lane)) count++
    return count
  }
  assert.deepEqual([pushed(1), pushed(2), pushed(3), pushed(4)], [6, 3, 2, 1])
  assert.equal(queue.size, 12)
  const names = (count: number) => queue.take(count).map(({ name }) => name)
  assert.deepEqual(names(5), ['1', '2', '3', '4', '1'])
  assert.ok(push('late', 5))
  assert.deepEqual(names(4), ['2', '3', '1', 'late'])
  assert.deepEqual(names(100), ['2', '1', '1', '1'])
  assert.equal(queue.size, 0)
  assert.deepEqual(queue.take(1), [])
})

test('a lane is a /24 or a /48, and the families have none in common', () => {
  const lane = (text: string) => laneOf(ip(text))
  assert.equal(lane('10.1.2.3'), lane('10.1.2.250'))
  assert.notEqual(lane('10.1.2.3'), lane('10.1.3.3'))
  assert.equal(lane('fd00:1:2:3::1'), lane('fd00:1:2:ffff::2'))
  assert.notEqual(lane('fd00:1:2::1'), lane('fd00:1:3::1'))
  const other = new Set(['0.0.0.1', '255.255.255.1', '::1', 'ffff:ffff:ffff::'].map(lane))
  assert.equal(other.add(laneOf(undefined)).size, 5)
})

test('a worker that is lost is replaced; what it had is turned away, and nothing waits for ever', async (t) => {
  const { key, tokens } = makeTokens(1)
  const [token = ''] = tokens
  const pool = startPool(t, 1)
  const started = new Promise<Worker>((resolve) => process.once('worker', resolve))
  const lost = Array.from({ length: 50 }, () => pool.verify({ token, key }))
  const outcomes = Promise.allSettled(lost)
  await (await started).terminate()
  for (const outcome of await outcomes) {
    assert.equal(outcome.status, 'rejected')
    assert.equal((outcome.reason as TokenError).fault, 'busy')
  }
  assert.equal(await pool.verify({ token, key }), true)
  assert.equal(pool.waiting, 0)
})

test('a pool that is closed turns away what waits, and what comes', async () => {
  const { key, tokens } = makeTokens(1)
  const [token = ''] = tokens
  const pool = createVerifyPool(1)
  const waiting = pool.verify({ token, key })
  const outcome = assert.rejects(waiting, { fault: 'busy' })
  await pool[Symbol.asyncDispose]()
  await outcome
  await assert.rejects(pool.verify({ token, key }), { fault: 'busy' })
})

function startPool(t: TestContext, size?: number) {
  const pool = createVerifyPool(size)
  t.after(() => pool[Symbol.asyncDispose]())
  return pool
}

function makeTokens(count: number) {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const tokens = Array.from({ length: count }, (_, i) => {
    const signed = `eyJhbGciOiJFUzI1NiJ9.${Buffer.from(`payload ${i}`).toString('base64url')}`
    const signature = sign('sha256', Buffer.from(signed), { key: privateKey, dsaEncoding: 'ieee-p1363' })
    return `${signed}.${signature.toString('base64url')}`
  })
  return { key: importVerificationKey(publicKey.export({ format: 'jwk' })), tokens }
}

function ip(text: string): Ip {
  const parsed = parseIp(text)
  assert.ok(parsed, text)
  return parsed
}

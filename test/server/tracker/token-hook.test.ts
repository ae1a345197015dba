import assert from 'node:assert/strict'
import { createHmac, randomUUID } from 'node:crypto'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import type { JWTPayload } from 'jose'
import { SignJWT, UnsecuredJWT } from 'jose'
import type { Ip } from '../../../lib/protocol/address.ts'
import { parseIp } from '../../../lib/protocol/address.ts'
import { parseAnnounce } from '../../../lib/protocol/announce.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { parseScrape } from '../../../lib/protocol/scrape.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { createTickets } from '../../../lib/token/ticket.ts'
import { openKeySetVerifier } from '../../../lib/token/key-set-verifier.ts'
import type { AnnounceRequest, Frontend } from '../../../server/tracker/hooks.ts'
import { tokenApproval } from '../../../server/tracker/hooks/token.ts'
import type { Answer, TestKey } from '../../support/key-server.ts'
import { body, keys, makeTestKey, startKeyServer } from '../../support/key-server.ts'
import { until } from '../../support/until.ts'

const hash = 'ab'.repeat(20)
const otherHash = 'cd'.repeat(20)
const issuer = 'https://registry.example.com'
const audience = 'https://tracker.example.com'
const ec = makeTestKey('ec')
const ed = makeTestKey('ed', 'Ed25519')
const rsa = makeTestKey('rsa', 'RS256')
const missing = 'unapproved request: missing jwt'
const invalid = 'unapproved request: invalid jwt'

test('a right token of each algorithm is let in', async (t) => {
  const { announce, faults } = await startHook(t)
  for (const [key, alg] of [
    [ec, 'ES256'],
    [ed, 'Ed25519'],
    [ed, 'EdDSA'],
    [rsa, 'RS256'],
  ] as const) {
    const token = await mint({ key, alg })
    assert.equal((await announce(token)).outcome, 'ok', alg)
    assert.equal((await announce(token)).outcome, 'ok', `${alg}, again`)
  }
  assert.deepEqual(faults, [])
})

test('a token is for its infohash, whatever case the claim is in', async (t) => {
  const { announce, faults } = await startHook(t)
  assert.equal((await announce(await mint({ infohash: hash.toUpperCase() }))).outcome, 'ok')
  const other = await mint({ infohash: otherHash })
  assert.equal((await announce(other)).outcome, invalid)
  assert.equal((await announce(other)).outcome, invalid, 'from the cache too')
  assert.equal((await announce(other, { hash: otherHash })).outcome, 'ok')
  assert.deepEqual(faults, ['wrong_infohash', 'wrong_infohash'])
})

test('each wrong token gets the same words, and the operator the reason', async (t) => {
  const { announce, faults, clock } = await startHook(t)
  const seconds = clock.now / 1000
  const good = await mint()
  const [header = '', payload = '', signature = ''] = good.split('.')
  const encode = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url')
  const claims = JSON.parse(Buffer.from(payload, 'base64url').toString()) as JWTPayload
  const pem = rsa.publicKey.export({ type: 'spki', format: 'pem' })
  const hmacInput = `${encode({ alg: 'HS256', kid: 'rsa', typ: 'announce+jwt' })}.${payload}`
  const hmac = createHmac('sha256', pem).update(hmacInput).digest('base64url')
  const unsecured = new UnsecuredJWT(claims).encode()
  const none = `${encode({ alg: 'none', kid: 'ec', typ: 'announce+jwt' })}.${payload}.`
  const cases: readonly (readonly [string, string | Promise<string>, string])[] = [
    ['wrong aud', mint({ aud: 'https://other.example.com' }), 'wrong_audience'],
    ['aud array without us', mint({ aud: ['https://other.example.com'] }), 'wrong_audience'],
    ['wrong iss', mint({ iss: 'https://other.example.com' }), 'wrong_issuer'],
    ['missing kid', mint({}, { kid: undefined }), 'unknown_key'],
    ['unknown kid', mint({}, { kid: 'nobody' }), 'unknown_key'],
    ['alg none', none, 'wrong_algorithm'],
    ['alg none, as a library writes it', unsecured, 'wrong_type'],
    ['HS256 signed with the public key', `${hmacInput}.${hmac}`, 'wrong_algorithm'],
    ['another key of the set', mint({ key: makeTestKey('ec') }), 'bad_signature'],
    [
      'tampered payload',
      `${header}.${encode({ ...claims, infohash: otherHash })}.${signature}`,
      'bad_signature',
    ],
    [
      'tampered header',
      `${encode({ alg: 'ES256', kid: 'ec', typ: 'announce+jwt', x: 1 })}.${payload}.${signature}`,
      'bad_signature',
    ],
    ['crit', mint({}, { crit: ['x'], x: 1 }), 'malformed'],
    ['exp past', mint({ exp: seconds - 120 }), 'expired'],
    ['no exp', mint({ exp: undefined }), 'missing_claim'],
    ['nbf future', mint({ nbf: seconds + 121 }), 'not_yet_valid'],
    ['iat future', mint({ iat: seconds + 121 }), 'not_yet_valid'],
    ['another kind', mint({ scopes: [] }, { typ: 'api+jwt' }), 'wrong_type'],
    ['no typ', mint({}, { typ: undefined }), 'wrong_type'],
    ['scrape only', mint({ scope: 'scrape' }), 'wrong_scope'],
    ['another address', mint({ cidr: '10.0.0.8/32' }), 'wrong_address'],
    ['padding', `${good}=`, 'malformed'],
    [
      'a letter that latin1 cuts to the right one',
      `${good.slice(0, -1)}${String.fromCharCode(good.charCodeAt(good.length - 1) + 256)}`,
      'malformed',
    ],
    ['garbage', 'garbage', 'malformed'],
  ]
  for (const [name, token, fault] of cases) {
    assert.equal((await announce(await token)).outcome, invalid, name)
    assert.equal(faults.pop(), fault, name)
  }
  assert.equal((await announce(undefined)).outcome, missing)
  assert.equal((await announce('')).outcome, missing)
  assert.deepEqual(faults, ['missing', 'missing'])
  assert.equal((await announce(good)).outcome, 'ok')
  assert.equal((await announce(await mint({ aud: ['https://other.example.com', audience] }))).outcome, 'ok')
})

test('a token says where its bearer is, and from where it may be used', async (t) => {
  const { announce } = await startHook(t)
  const token = await mint({ rack: 'rack-7', cidr: '10.0.0.0/24' })
  assert.deepEqual(await announce(token), { outcome: 'ok', place: 'rack-7', trackerId: undefined })
  assert.equal((await announce(token, { from: '10.0.1.7' })).outcome, invalid)
  assert.equal((await announce(token, { from: 'fd00::7' })).outcome, invalid)
})

test('an expired token is refused, though it is in the cache', async (t) => {
  const { announce, clock, faults } = await startHook(t)
  const token = await mint()
  assert.equal((await announce(token)).outcome, 'ok')
  clock.now += 900_000 + 120_000
  assert.equal((await announce(token)).outcome, invalid)
  assert.deepEqual(faults, ['expired'])
})

test('a scrape is only for the swarm of its token', async (t) => {
  const { scrape, faults } = await startHook(t)
  const token = await mint({ cidr: '10.0.0.0/24' })
  assert.equal(await scrape([hash], { token }), 'ok')
  assert.equal(await scrape([hash, hash], { token }), 'ok')
  assert.equal(await scrape([hash, otherHash], { token }), invalid)
  assert.equal(await scrape([], { token }), invalid, 'all swarms')
  assert.equal(await scrape([hash], { token, from: '10.0.1.1' }), invalid)
  assert.equal(await scrape([hash], { token: await mint({ scope: 'announce peer' }) }), invalid)
  assert.equal(await scrape([hash]), missing)
  assert.equal(await scrape([hash], { frontend: 'udp' }), missing)
  assert.deepEqual(faults, [
    'wrong_infohash',
    'wrong_infohash',
    'wrong_address',
    'wrong_scope',
    'missing',
    'missing',
  ])
})

test('configured networks scrape without a token, by UDP and by HTTP, and announce with one', async (t) => {
  const { scrape, announce } = await startHook(t, { scrapeNetworks: ['10.9.0.0/16', 'fd00::/16'] })
  for (const frontend of ['udp', 'http'] as const) {
    assert.equal(await scrape([hash, otherHash], { from: '10.9.1.1', frontend }), 'ok')
    assert.equal(await scrape([], { from: 'fd00::1', frontend }), 'ok')
    assert.equal(await scrape([hash], { from: '10.8.1.1', frontend }), missing)
  }
  assert.equal(await scrape([hash], { from: '10.9.1.1', token: 'garbage' }), invalid)
  assert.equal((await announce(undefined, { from: '10.9.1.1' })).outcome, missing)
})

test('a ticket spares the signature after a restart, and nothing else', async (t) => {
  const secret = 'a secret of thirty-two characters'
  const { announce, verifier } = await startHook(t, { secret })
  const token = await mint({ rack: 'rack-7' })
  const { trackerId: ticket } = await announce(token)
  assert.match(ticket ?? '', /^[\w-]{22}$/)
  assert.equal((await announce(token, { trackerId: ticket })).trackerId, undefined, 'it is told once')
  assert.equal((await announce(token, { trackerId: 'other' })).trackerId, ticket)
  assert.equal(verifier.verifierStats().cachedTokens, 1)

  const again = await startHook(t, { secret })
  const request = again.announceNow(token, { trackerId: ticket })
  assert.deepEqual(request, { outcome: 'ok', place: 'rack-7', trackerId: undefined }, 'without a wait')
  assert.equal((await again.announce(token, { hash: otherHash, trackerId: ticket })).outcome, invalid)

  const expired = await startHook(t, { secret })
  expired.clock.now += 900_000 + 120_000
  assert.equal((await expired.announce(token, { trackerId: ticket })).outcome, invalid)
  const rotated = await startHook(t, { secret, answer: keys(makeTestKey('ec')) })
  assert.equal((await rotated.announce(token, { trackerId: ticket })).outcome, invalid)
  const removed = await startHook(t, { secret, answer: keys(rsa) })
  assert.equal((await removed.announce(token, { trackerId: ticket })).outcome, invalid)
  const revoking = await startHook(t, { secret, isRevoked: () => true })
  assert.equal((await revoking.announce(token, { trackerId: ticket })).outcome, invalid)
  assert.deepEqual(
    [expired, rotated, removed, revoking].flatMap(({ faults }) => faults),
    ['expired', 'bad_signature', 'unknown_key', 'revoked'],
  )
})

test('a wrong ticket is as good as none: the signature decides', async (t) => {
  const { announce, faults } = await startHook(t, { secret: 'a secret of thirty-two characters' })
  const strangers = createTickets('another secret of thirty-two chars')
  const token = await mint()
  const [header = '', payload = ''] = token.split('.')
  const forged = `${header}.${payload}.${'A'.repeat(86)}`
  const ticket = strangers.issue(token, { thumbprint: 'x' } as Parameters<typeof strangers.issue>[1])
  assert.equal((await announce(forged, { trackerId: ticket })).outcome, invalid)
  assert.equal((await announce(token, { trackerId: ticket })).outcome, 'ok')
  const { trackerId } = await announce(token)
  assert.equal((await announce(forged, { trackerId })).outcome, invalid, 'the ticket of another token')
  assert.deepEqual(faults, ['bad_signature', 'bad_signature'])
})

test('a load that is too high is not called an invalid token', async (t) => {
  const { announce, faults } = await startHook(t)
  const [header = '', payload = ''] = (await mint()).split('.')
  const signature = () =>
    Buffer.from(randomUUID() + randomUUID())
      .subarray(0, 64)
      .toString('base64url')
  const flood = Array.from({ length: 10_500 }, () => announce(`${header}.${payload}.${signature()}`))
  const outcomes = Map.groupBy(await Promise.all(flood), ({ outcome }) => outcome)
  const [turnedAway] = outcomes.get('tracker is busy, try again, in 1 min') ?? []
  assert.ok(turnedAway, [...outcomes.keys()].join())
  assert.equal(outcomes.size, 2)
  assert.deepEqual(new Set(faults), new Set(['bad_signature', 'busy']))
})

test('keys that are down at the start: nothing is let in until they come', async (t) => {
  const down: Answer = (request) => request.socket.destroy()
  const { announce, faults, verifier, server } = await startHook(t, { answer: down })
  const token = await mint()
  assert.equal((await announce(token)).outcome, invalid)
  assert.equal((await announce(token)).outcome, invalid)
  assert.deepEqual(faults, ['unknown_key', 'unknown_key'])
  const { keys: count, ageSeconds, lastError } = verifier.keySetStatus()
  assert.deepEqual([count, ageSeconds, typeof lastError], [0, undefined, 'string'])
  server.state.answer = keys(ec)
  await until('the keys came', () => verifier.keySetStatus().keys === 1)
  assert.equal((await announce(token)).outcome, 'ok')
})

test('keys that rotate: an unknown kid fetches them, once for all that wait; the old go out of force', async (t) => {
  const { announce, faults, server, verifier } = await startHook(t, { answer: keys(ec) })
  const next = makeTestKey('next')
  const old = await mint()
  assert.equal((await announce(old)).outcome, 'ok')
  server.state.answer = keys(ec, next)
  const tokens = await Promise.all(Array.from({ length: 20 }, () => mint({ key: next })))
  const outcomes = await Promise.all(tokens.map((token) => announce(token)))
  assert.ok(outcomes.every(({ outcome }) => outcome === 'ok'))
  assert.equal(server.state.requests, 2)
  assert.equal((await announce(old)).outcome, 'ok')
  server.state.answer = keys(next)
  await verifier.reload()
  assert.equal((await announce(old)).outcome, invalid, 'though it was in the cache')
  assert.equal((await announce(tokens[0])).outcome, 'ok')
  assert.deepEqual(faults, ['unknown_key'])
})

test('invented kids fetch the keys once in ten seconds, and wrong claims never', async (t) => {
  const { announce, server, clock, faults } = await startHook(t, { answer: keys(ec) })
  const nobody = makeTestKey('nobody')
  assert.equal(
    (await announce(await mint({ key: nobody, aud: 'https://other.example.com' }))).outcome,
    invalid,
  )
  assert.equal(server.state.requests, 1)
  for (let i = 0; i < 5; i++) assert.equal((await announce(await mint({ key: nobody }))).outcome, invalid)
  assert.equal(server.state.requests, 2)
  clock.now += 10_000
  server.state.answer = keys(ec, nobody)
  assert.equal((await announce(await mint({ key: nobody }))).outcome, 'ok')
  assert.equal(server.state.requests, 3)
  assert.deepEqual(faults, ['wrong_audience', ...Array<string>(5).fill('unknown_key')])
})

test('keys that turn into an error page, or into none, leave the last good ones in force', async (t) => {
  const { announce, server, verifier } = await startHook(t)
  for (const answer of [body('', 500), body('<html>'), body('{"keys": []}'), body('{}')]) {
    server.state.answer = answer
    await assert.rejects(verifier.reload(), /Cannot fetch key set http:\/\/127\.0\.0\.1/)
    assert.equal((await announce(await mint())).outcome, 'ok')
  }
})

test('Quay tokens are let in only where they are asked for', async (t) => {
  const announceUrl = `${audience}/announce`
  /** As Quay makes them: jwt.encode({iss, aud, infohash}, RS256, header kid). */
  const quay = (claims: JWTPayload = {}, header: object = {}, key = rsa) =>
    new SignJWT({ iss: issuer, aud: announceUrl, infohash: hash, ...claims })
      .setProtectedHeader({ alg: key.alg, kid: key.kid, ...header })
      .sign(key.privateKey)
  const open = await startHook(t, { acceptChihaya: true })
  const accepted = [
    quay(),
    quay({}, { typ: 'JWT' }),
    quay({ infohash: hash.toUpperCase() }),
    quay({ aud: [announceUrl] }),
    quay({ aud: audience }),
    quay({ exp: open.clock.now / 1000 + 60 }),
    mint(),
  ]
  for (const token of accepted) assert.equal((await open.announce(await token)).outcome, 'ok')
  const refused: readonly (readonly [Promise<string>, string])[] = [
    [quay({ infohash: otherHash }), 'wrong_infohash'],
    [quay({ aud: 'https://other.example.com/announce' }), 'wrong_audience'],
    [quay({ iss: 'quay' }), 'wrong_issuer'],
    [quay({ exp: open.clock.now / 1000 - 120 }), 'expired'],
    [quay({ infohash: undefined }), 'missing_claim'],
    [quay({}, {}, ec), 'wrong_type'],
    [quay({}, { typ: 'at+jwt' }), 'missing_claim'],
    [quay({}, {}, makeTestKey('rsa', 'RS256')), 'bad_signature'],
    [quay({}, { kid: 'ec' }), 'wrong_algorithm'],
  ]
  for (const [token, fault] of refused) {
    assert.equal((await open.announce(await token)).outcome, invalid, fault)
    assert.equal(open.faults.pop(), fault)
  }
  assert.equal(await open.scrape([hash], { token: await quay() }), 'ok')

  const asQuayNamesThem = await startHook(t, { acceptChihaya: true, issuer: 'quay', audience: announceUrl })
  assert.equal((await asQuayNamesThem.announce(await quay({ iss: 'quay' }))).outcome, 'ok')

  const closed = await startHook(t)
  assert.equal((await closed.announce(await quay())).outcome, invalid)
  assert.equal((await closed.announce(await quay({}, { typ: 'JWT' }))).outcome, invalid)
  assert.deepEqual(closed.faults, ['wrong_type', 'wrong_type'])
})

interface HookOptions {
  answer?: Answer
  scrapeNetworks?: readonly string[]
  secret?: string
  acceptChihaya?: boolean
  isRevoked?: (id: string) => boolean
  issuer?: string
  audience?: string
}

/** The hook over a verifier by keys from a real HTTP server. */
async function startHook(t: TestContext, options: HookOptions = {}) {
  const { answer = keys(ec, ed, rsa), scrapeNetworks = [], secret, ...rest } = options
  const server = await startKeyServer(t, answer)
  const clock = { now: startMs }
  const verifier = await openKeySetVerifier({
    issuer,
    audience,
    clockToleranceMs: 120_000,
    now: () => clock.now,
    ...rest,
    keySet: { url: server.url },
    tickets: secret === undefined ? undefined : createTickets(secret),
  })
  t.after(() => verifier[Symbol.asyncDispose]())
  const faults: string[] = []
  const hook = tokenApproval({
    verifier,
    scrapeNetworks: scrapeNetworks.map(parseCidr),
    refused: (fault) => faults.push(fault),
    log: silentLog(),
  })
  const announceRequest = (token: string | undefined, more: AnnounceOptions): AnnounceRequest => ({
    frontend: 'http',
    announce: parseAnnounce(
      [
        `info_hash=${escape(more.hash ?? hash)}`,
        `peer_id=${'p'.repeat(20)}&port=6881&uploaded=0&downloaded=0&left=1`,
        ...(token === undefined ? [] : [`jwt=${token}`]),
        ...(more.trackerId === undefined ? [] : [`trackerid=${more.trackerId}`]),
      ].join('&'),
    ),
    source: ip(more.from ?? '10.0.0.7'),
    place: undefined,
    trackerId: undefined,
    extraIntervalSeconds: 0,
    extraMinIntervalSeconds: 0,
  })
  const announceNow = (token: string | undefined, more: AnnounceOptions = {}) => {
    const request = announceRequest(token, more)
    assert.equal(hook.announce?.(request), undefined, 'it has answered at once')
    return { outcome: 'ok', place: request.place, trackerId: request.trackerId }
  }
  const announce = async (token: string | undefined, more: AnnounceOptions = {}) => {
    const request = announceRequest(token, more)
    const outcome = await outcomeOf(() => hook.announce?.(request))
    return { outcome, place: request.place, trackerId: request.trackerId }
  }
  const scrape = (
    hashes: readonly string[],
    more: { token?: string; from?: string; frontend?: Frontend } = {},
  ) => {
    const query = hashes.map((value) => `info_hash=${escape(value)}`)
    if (more.token !== undefined) query.push(`jwt=${more.token}`)
    const request = {
      frontend: more.frontend ?? 'http',
      scrape: parseScrape(query.join('&')),
      source: ip(more.from ?? '10.0.0.7'),
    }
    return outcomeOf(() => hook.scrape?.(request))
  }
  return { announce, announceNow, scrape, faults, clock, verifier, server }
}

interface AnnounceOptions {
  hash?: string
  from?: string
  trackerId?: string | undefined
}

/** What the client gets to read. */
async function outcomeOf(run: () => void | Promise<void>): Promise<string> {
  try {
    await run()
    return 'ok'
  } catch (error) {
    assert.ok(error instanceof ClientError, String(error))
    const { message, retryInMinutes } = error
    return retryInMinutes === undefined ? message : `${message}, in ${retryInMinutes} min`
  }
}

const startMs = 1_800_000_000_000

/** An announce token, as the registry makes them but for what is given; `undefined` leaves a claim out. */
async function mint(
  { key = ec, alg = key.alg, ...claims }: Record<string, unknown> & { key?: TestKey; alg?: string } = {},
  header: Record<string, unknown> = {},
): Promise<string> {
  const seconds = startMs / 1000
  const payload = {
    iss: issuer,
    aud: audience,
    sub: 'host-1',
    infohash: hash,
    iat: seconds,
    nbf: seconds,
    exp: seconds + 900,
    jti: randomUUID(),
    ...claims,
  }
  const signer = new SignJWT(payload).setProtectedHeader({
    alg,
    kid: key.kid,
    typ: 'announce+jwt',
    ...header,
  })
  return signer.sign(key.privateKey, { crit: { x: true } })
}

function escape(hex: string): string {
  return hex.replace(/../g, '%$&')
}

function ip(text: string): Ip {
  const parsed = parseIp(text)
  assert.ok(parsed, text)
  return parsed
}

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createPublicKey, generateKeyPairSync } from 'node:crypto'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { digestFromHex } from '../../../lib/protocol/digest.ts'
import type { AttachedBundle } from '../../../lib/protocol/dsse.ts'
import { bundleMaxBytes } from '../../../lib/protocol/dsse.ts'
import type { ReleaseIdentity, Statement } from '../../../lib/protocol/statement.ts'
import { releaseStatement } from '../../../lib/protocol/statement.ts'
import { algorithms } from '../../../lib/token/algorithms.ts'
import type { ReleaseKey, ReleaseSigner } from '../../../lib/token/release-keys.ts'
import {
  generateReleaseKeys,
  parseReleaseKey,
  parseReleaseKeys,
  readReleaseKeys,
  readReleaseSigner,
} from '../../../lib/token/release-keys.ts'
import { openBundle, signStatement, verifyRelease } from '../../../lib/token/release-signature.ts'

const release: ReleaseIdentity = { repository: 'web', tag: '1', digest: digestFromHex('a'.repeat(64)) }
const statement = statementFor(release)

test('each algorithm signs, and its signature is good for its own key alone', async (t) => {
  for (const algorithm of algorithms) {
    const signer = await newSigner(t, algorithm)
    const other = await newSigner(t, algorithm)
    const bundle = signStatement(statement, signer)
    const { statement: read, key } = openBundle(bundle, [other, signer])
    assert.equal(key.id, signer.id, algorithm)
    assert.deepEqual(read, statement)
    assert.throws(() => openBundle(bundle, [other]), /key that is not trusted here: /, algorithm)
    assert.throws(() => openBundle(bundle, []), /key that is not trusted here/)
  }
})

test('openssl finds the same key id, and the same signature good', async (t) => {
  const directory = await temporaryDirectory(t)
  const { id, privatePem, publicPem } = generateReleaseKeys('ES256')
  await writeFile(join(directory, 'key'), privatePem, { mode: 0o600 })
  await writeFile(join(directory, 'pub'), publicPem)
  const der = execFileSync('openssl', ['pkey', '-pubin', '-in', join(directory, 'pub'), '-outform', 'DER'])
  const hash = execFileSync('openssl', ['dgst', '-sha256', '-binary'], { input: der })
  assert.equal(hash.toString('base64'), id)
  const { dsseEnvelope } = JSON.parse(
    signStatement(statement, await readReleaseSigner(join(directory, 'key'))).toString(),
  ) as { dsseEnvelope: { payloadType: string; payload: string; signatures: { sig: string }[] } }
  const { payloadType, payload, signatures } = dsseEnvelope
  const body = Buffer.from(payload, 'base64')
  await writeFile(join(directory, 'sig'), Buffer.from(signatures[0]?.sig ?? '', 'base64'))
  const signed = Buffer.concat([
    Buffer.from(`DSSEv1 ${payloadType.length} ${payloadType} ${body.length} `),
    body,
  ])
  execFileSync(
    'openssl',
    ['dgst', '-sha256', '-verify', join(directory, 'pub'), '-signature', join(directory, 'sig')],
    { input: signed },
  )
})

test('whatever is changed in a bundle, it is good no longer', async (t) => {
  const signer = await newSigner(t)
  const bundle = signStatement(statement, signer)
  const change = (edit: (envelope: Edited) => void): Buffer => {
    const json = JSON.parse(bundle.toString()) as { dsseEnvelope: Edited }
    edit(json.dsseEnvelope)
    return Buffer.from(JSON.stringify(json))
  }
  const changed = {
    payload: change((envelope) => {
      const text = Buffer.from(envelope.payload, 'base64').toString().replaceAll('"web"', '"dev"')
      envelope.payload = Buffer.from(text).toString('base64')
    }),
    'payload type': change((envelope) => {
      envelope.payloadType = 'application/json'
    }),
    signature: change((envelope) => {
      envelope.signatures = [{ keyid: signer.id, sig: Buffer.alloc(70, 1).toString('base64') }]
    }),
  }
  for (const [name, bytes] of Object.entries(changed)) {
    const verdict = await verify(release, [bytes], [signer])
    assert.equal(verdict.kind === 'unverified' && verdict.fault, 'bad_signature', name)
  }
})

test('one good signature is enough, whatever lies beside it, and what came closest is told where none is', async (t) => {
  const [ours, theirs] = [await newSigner(t), await newSigner(t, 'Ed25519')]
  const good = signStatement(statement, ours)
  const foreign = signStatement(statement, theirs)
  const elsewhere = signStatement(statementFor({ ...release, repository: 'db' }), ours)
  const otherTag = signStatement(statementFor({ ...release, tag: '2' }), ours)
  const junk = Buffer.from('junk')
  const huge = Buffer.alloc(bundleMaxBytes + 1, 0x20)
  const gone: AttachedBundle = { digest: 'sha256:x', fault: 'unreadable', reason: 'it cannot be had' }
  const more: AttachedBundle = { digest: 'sha256:y', fault: 'too_many', reason: 'only 100 are looked at' }
  const verdict = await verify(release, [gone, junk, huge, foreign, elsewhere, otherTag, good], [ours])
  assert.equal(verdict.kind === 'signed' && verdict.keyId, ours.id)
  const cases = [
    [[], 'unsigned', /it is not signed/],
    [[gone], 'unreadable', /cannot be had/],
    [[junk, gone], 'unreadable', /not JSON/],
    [[huge], 'unreadable', /at most 1048576/],
    [[junk, foreign], 'unknown_key', /not trusted here/],
    [[foreign, elsewhere, junk], 'other_release', /its signature is for db/],
    [[elsewhere, otherTag, foreign], 'other_tag', /for the tag 2/],
    [[otherTag, more], 'too_many', /only 100 are looked at/],
  ] as const
  for (const [bundles, fault, why] of cases) {
    const refused = await verify(release, bundles, [ours])
    if (refused.kind === 'signed') assert.fail(fault)
    assert.equal(refused.fault, fault)
    assert.match(refused.reason, why)
  }
  const any = await verifyRelease(release, listed([otherTag]), { keys: [ours], anyTag: true })
  assert.equal(any.kind, 'signed')
})

test('an envelope with two signatures is good by the one whose key is trusted', async (t) => {
  const [ours, theirs] = [await newSigner(t), await newSigner(t)]
  const json = JSON.parse(signStatement(statement, theirs).toString()) as { dsseEnvelope: Edited }
  const second = JSON.parse(signStatement(statement, ours).toString()) as { dsseEnvelope: Edited }
  json.dsseEnvelope.signatures.push(...second.dsseEnvelope.signatures)
  const both = Buffer.from(JSON.stringify(json))
  for (const key of [ours, theirs]) {
    const verdict = await verify(release, [both], [key])
    assert.equal(verdict.kind === 'signed' && verdict.keyId, key.id)
  }
})

test('what the same key has signed that is no provenance of a release approves of none', async (t) => {
  const signer = await newSigner(t)
  const scan = signStatement({ ...statement, predicateType: 'https://example.com/scan/v1' }, signer)
  const verdict = await verify(release, [scan], [signer])
  assert.match(
    verdict.kind === 'unverified' ? verdict.reason : '',
    /what is signed is https:\/\/example\.com/,
  )
})

test('public keys come as PEM, one or several, as JWK and as JWK Set', () => {
  const made = algorithms.map((algorithm) => generateReleaseKeys(algorithm))
  const ids = made.map(({ id }) => id)
  const jwks = made.map(({ publicPem }) => createPublicKey(publicPem).export({ format: 'jwk' }))
  const idsOf = (text: string) => parseReleaseKeys(text).map(({ id }) => id)
  assert.deepEqual(idsOf(made.map(({ publicPem }) => `# a comment\n${publicPem}`).join('\n')), ids)
  assert.deepEqual(idsOf(JSON.stringify({ keys: jwks })), ids)
  for (const [i, jwk] of jwks.entries()) assert.deepEqual(idsOf(JSON.stringify(jwk)), [ids[i]])
})

test('a key is the same where it goes as SubjectPublicKeyInfo, and nothing else is taken for one', () => {
  for (const algorithm of algorithms) {
    const [key] = parseReleaseKeys(generateReleaseKeys(algorithm).publicPem)
    assert.deepEqual(parseReleaseKey(key?.spki ?? ''), key)
  }
  assert.throws(() => parseReleaseKey(''))
  assert.throws(() => parseReleaseKey('A'.repeat(2049)), /2049 characters, at most 2048/)
  const small = generateKeyPairSync('rsa', { modulusLength: 1024 }).publicKey
  const spki = small.export({ type: 'spki', format: 'der' }).toString('base64url')
  assert.throws(() => parseReleaseKey(spki), /1024 bits, need 2048/)
})

test('a key that cannot be used is named with its file and the reason', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'key')
  const { privatePem, publicPem } = generateReleaseKeys('ES256')
  const pem = (curve: string) =>
    generateKeyPairSync('ec', { namedCurve: curve }).publicKey.export({ type: 'spki', format: 'pem' })
  const small = generateKeyPairSync('rsa', { modulusLength: 1024 }).publicKey
  const publicCases: readonly (readonly [string, RegExp])[] = [
    [privatePem, /key.*private key, which is nobody else/],
    ['', /no public key/],
    ['{', /JSON/],
    ['{"keys": []}', /no public key/],
    [pem('secp384r1'), /P-256, Ed25519 or RSA/],
    [small.export({ type: 'spki', format: 'pem' }), /1024 bits, need 2048/],
  ]
  for (const [text, why] of publicCases) {
    await writeFile(file, text)
    assert.throws(
      () => readReleaseKeys(file),
      (error: Error) => error.message.includes(file) && why.test(error.message),
      text,
    )
  }
  const encrypted = generateKeyPairSync('ed25519').privateKey.export({
    type: 'pkcs8',
    format: 'pem',
    cipher: 'aes-256-cbc',
    passphrase: 'secret',
  })
  for (const [text, why] of [
    [publicPem, /Cannot sign with/],
    [encrypted, /encrypted; need one without a passphrase/],
  ] as const) {
    await writeFile(file, text)
    await chmod(file, 0o600)
    await assert.rejects(readReleaseSigner(file), why)
  }
  await writeFile(file, privatePem)
  await chmod(file, 0o644)
  await assert.rejects(readReleaseSigner(file), /others can read it/)
})

interface Edited {
  payload: string
  payloadType: string
  signatures: { keyid: string; sig: string }[]
}

function statementFor({ repository, tag, digest }: ReleaseIdentity): Statement {
  return releaseStatement({
    repository,
    tags: tag === undefined ? [] : [tag],
    digest,
    files: [{ name: 'build.tar', digest: digestFromHex('b'.repeat(64)), infoHash: undefined }],
    provenance: { buildType: 'urn:rackswarm:publish:v1', builderId: 'urn:rackswarm:builder:unknown' },
  })
}

async function newSigner(
  t: TestContext,
  algorithm: (typeof algorithms)[number] = 'ES256',
): Promise<ReleaseSigner> {
  const file = join(await temporaryDirectory(t), 'key')
  await writeFile(file, generateReleaseKeys(algorithm).privatePem, { mode: 0o600 })
  return readReleaseSigner(file)
}

async function verify(
  wanted: ReleaseIdentity,
  bundles: readonly (Buffer | AttachedBundle)[],
  keys: readonly ReleaseKey[],
) {
  return verifyRelease(wanted, listed(bundles), { keys, anyTag: false })
}

async function* listed(bundles: readonly (Buffer | AttachedBundle)[]): AsyncGenerator<AttachedBundle> {
  for (const [i, bundle] of bundles.entries())
    yield await Promise.resolve('digest' in bundle ? bundle : { digest: `sha256:${i}`, bytes: bundle })
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-keys-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { generateKeyPairSync, X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import { readFile, stat, writeFile } from 'node:fs/promises'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { describe, test } from 'node:test'
import { connect as connectTls } from 'node:tls'
import type { Engine, EngineConfig, TokenSender } from '../../../agent/engine/engine.ts'
import type { HostIdentity } from '../../../agent/host-identity.ts'
import { openHostIdentity } from '../../../agent/host-identity.ts'
import { selfSigned } from '../../../agent/self-signed.ts'
import { encode } from '../../../lib/protocol/bencode.ts'
import { infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import { until } from '../../support/until.ts'
import { handshake, message, mebibyte, peerAt, peerFeed, randomBlob, temporaryDirectory } from './fixtures.ts'
import type { Seeder } from './own-engine.ts'
import { assertFetched, startEngine, startFetch, startSeeder } from './own-engine.ts'

/** Tokens that name a thumbprint, as those of the server do. */
function admitting(own: string | undefined, seen: TokenSender[] = []): Partial<EngineConfig> {
  return {
    peerTokens: { tokenFor: () => own ?? 'nobody' },
    admission: {
      admit: async (token, _infoHash, from) => {
        seen.push(from)
        if (from.thumbprint !== undefined && token !== from.thumbprint) return undefined
        return { untilMs: Infinity, host: 'proven', place: undefined }
      },
    },
  }
}

function settingsOf(identity: HostIdentity, required: boolean): Partial<EngineConfig> {
  return { ...admitting(identity.thumbprint), tls: { ...identity, required } }
}

/** Stands between, and keeps what passes. */
async function startEavesdropper(t: TestContext, port: number) {
  const heard: Buffer[] = []
  const sockets: Socket[] = []
  const server = createServer((socket) => {
    const onward = connect(port, '127.0.0.1')
    sockets.push(socket, onward)
    for (const [from, to] of [
      [socket, onward],
      [onward, socket],
    ] as const) {
      from.on('data', (bytes: Buffer) => {
        heard.push(bytes)
        to.write(bytes)
      })
      from.on('error', () => undefined)
      from.on('close', () => to.destroy())
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return { peer: peerAt((server.address() as AddressInfo).port), heard: () => Buffer.concat(heard) }
}

describe('rackswarm with TLS between agents', { concurrency: false }, () => {
  const blob = randomBlob(8 * mebibyte)

  async function identities(t: TestContext) {
    const directory = await temporaryDirectory(t)
    const of = (name: string) => openHostIdentity(join(directory, `${name}.pem`), name)
    return { directory, one: await of('one'), two: await of('two') }
  }

  async function fetchFrom(t: TestContext, directory: string, engine: Engine, peer: Seeder['peer']) {
    const file = join(directory, `copy-${engine.port}`)
    const handle = startFetch(engine, blob, file, peerFeed(peer))
    t.after(() => handle.close())
    return { handle, whole: () => assertFetched(handle, blob, file) }
  }

  test('whoever listens in reads nothing of the build, nor of the tokens', async (t) => {
    const { directory, one, two } = await identities(t)
    const seeder = await startSeeder(t, directory, blob, settingsOf(one, true))
    const eavesdropper = await startEavesdropper(t, seeder.engine.port)
    const engine = await startEngine(t, settingsOf(two, true))
    await (await fetchFrom(t, directory, engine, eavesdropper.peer)).whole()
    const heard = eavesdropper.heard()
    assert.ok(heard.length > blob.bytes.length)
    assert.equal(heard[0], 0x16, 'a TLS record')
    for (const secret of [
      blob.bytes.subarray(0, 64),
      infoHashToBytes(blob.metainfo.infoHash),
      one.thumbprint,
      two.thumbprint,
    ])
      assert.ok(!heard.includes(secret))
  })

  test('a token that was overheard opens nothing: the certificate is not the one it names', async (t) => {
    const { directory, one, two } = await identities(t)
    const seeder = await startSeeder(t, directory, blob, settingsOf(one, true))
    const thief = await startEngine(t, { ...settingsOf(two, true), ...admitting(one.thumbprint) })
    const { handle } = await fetchFrom(t, directory, thief, seeder.peer)
    await until('a refusal', () => seeder.handle.peerCount === 0 && handle.waitingReason !== undefined)
    assert.equal(handle.bytesVerified, 0)
    // Nor does a seeder get anything by it: the one that dials checks too.
    const liar = await startSeeder(t, directory, blob, {
      ...settingsOf(two, true),
      ...admitting(one.thumbprint),
    })
    const honest = await startEngine(t, settingsOf(one, true))
    const deceived = await fetchFrom(t, directory, honest, liar.peer)
    await until('a refusal', () => deceived.handle.waitingReason !== undefined)
    assert.equal(deceived.handle.bytesVerified, 0)
  })

  test('TLS without a certificate opens nothing, whatever token is shown', async (t) => {
    const { directory, one, two } = await identities(t)
    for (const required of [true, false]) {
      const seeder = await startSeeder(t, directory, blob, settingsOf(one, required))
      // Without a certificate no token could be compared with it: as if it had been overheard.
      const nameless = connectTls({ port: seeder.engine.port, host: '127.0.0.1', rejectUnauthorized: false })
      t.after(() => nameless.destroy())
      const received: Buffer[] = []
      nameless.on('error', () => undefined)
      nameless.on('data', (bytes: Buffer) => received.push(bytes))
      const introduction = encode({ m: {}, p: 1, rs: { token: two.thumbprint } })
      nameless.write(
        Buffer.concat([
          handshake(infoHashToBytes(blob.metainfo.infoHash), { extended: true }),
          message(20, Buffer.concat([Buffer.of(0), introduction])),
          message(2),
        ]),
      )
      await until('it to be let go', () => nameless.closed)
      assert.equal(Buffer.concat(received).length, 0, 'not even a handshake')
    }
  })

  test('`accept` takes both, `require` only TLS', async (t) => {
    const { directory, one, two } = await identities(t)
    const accepting = await startSeeder(t, directory, blob, settingsOf(one, false))
    const plain = await startEngine(t, admitting(undefined))
    await (await fetchFrom(t, directory, plain, accepting.peer)).whole()
    const secure = await startEngine(t, settingsOf(two, true))
    await (await fetchFrom(t, directory, secure, accepting.peer)).whole()
    const requiring = await startSeeder(t, directory, blob, settingsOf(one, true))
    const refused = await fetchFrom(t, directory, await startEngine(t, admitting(undefined)), requiring.peer)
    await until('a reason', () => refused.handle.waitingReason !== undefined)
    assert.equal(refused.handle.bytesVerified, 0)
    const other = await fetchFrom(t, directory, await startEngine(t, settingsOf(two, false)), requiring.peer)
    await until('a reason', () => other.handle.waitingReason !== undefined)
    assert.equal(other.handle.bytesVerified, 0, '`accept` itself dials without TLS')
  })

  test('strangers without a certificate, with garbage, or with silence cost a connection, and no more', async (t) => {
    const { directory, one, two } = await identities(t)
    const seeder = await startSeeder(t, directory, blob, settingsOf(one, true))
    const { port } = seeder.engine
    const nameless = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false })
    nameless.on('error', () => undefined)
    nameless.resume()
    nameless.write(handshake(infoHashToBytes(blob.metainfo.infoHash), { extended: true }))
    const sockets = Array.from({ length: 40 }, (_, i) => {
      const socket = connect(port, '127.0.0.1')
      socket.on('error', () => undefined)
      socket.resume()
      if (i % 2 === 0)
        socket.write(Buffer.from([0x16, 3, 1, 255, 255, ...Array.from({ length: 200 }, () => i)]))
      return socket
    })
    t.after(() => {
      for (const socket of [nameless, ...sockets]) socket.destroy()
    })
    const engine = await startEngine(t, settingsOf(two, true))
    await (await fetchFrom(t, directory, engine, seeder.peer)).whole()
    await until('all of them to be let go', () => [nameless, ...sockets].every(({ closed }) => closed), {
      withinMs: 15_000,
    })
  })
})

test("an identity is made once, is the owner's alone, and other programs read it", async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'peer-identity.pem')
  const identity = await openHostIdentity(file, 'host-1.example')
  assert.deepEqual(await openHostIdentity(file, 'host-1.example'), identity)
  assert.equal((await stat(file)).mode & 0o777, 0o600)
  assert.match(identity.thumbprint, /^[\w-]{43}$/)
  const text = execFileSync('openssl', ['x509', '-in', file, '-noout', '-text']).toString()
  assert.match(text, /Subject: CN ?= ?host-1\.example/)
  assert.match(text, /Signature Algorithm: ED25519/)
  assert.match(text, /Not After : Dec 31 23:59:59 9999 GMT/)
  execFileSync('openssl', ['verify', '-CAfile', file, '-check_ss_sig', file])
  await writeFile(file, (await readFile(file, 'utf8')).replace('BEGIN CERTIFICATE', 'BEGIN NOTHING'))
  await assert.rejects(openHostIdentity(file, 'host-1.example'), /peer-identity\.pem.*a new one is made/)
})

test('a name of any length fits into a certificate', () => {
  for (const length of [0, 1, 63, 64, 65, 300]) {
    const pair = generateKeyPairSync('ed25519')
    const certificate = new X509Certificate(selfSigned(pair, 'x'.repeat(length)))
    assert.equal(certificate.subject, `CN=${'x'.repeat(Math.min(64, length))}`)
    assert.ok(certificate.verify(pair.publicKey))
  }
})

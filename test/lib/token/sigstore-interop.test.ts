import assert from 'node:assert/strict'
import { createPublicKey, sign } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { bundleFromJSON, bundleToJSON } from '@sigstore/bundle'
import { DSSEBundleBuilder } from '@sigstore/sign'
import { Verifier, toSignedEntity, toTrustMaterial } from '@sigstore/verify'
import { digestFromHex } from '../../../lib/protocol/digest.ts'
import { releaseStatement, statementType, writeStatement } from '../../../lib/protocol/statement.ts'
import type { Algorithm } from '../../../lib/token/algorithms.ts'
import { algorithms } from '../../../lib/token/algorithms.ts'
import { generateReleaseKeys, readReleaseSigner } from '../../../lib/token/release-keys.ts'
import type { ReleaseSigner } from '../../../lib/token/release-keys.ts'
import { openBundle, signStatement } from '../../../lib/token/release-signature.ts'

const statement = releaseStatement({
  repository: 'web',
  tags: ['1'],
  digest: digestFromHex('a'.repeat(64)),
  files: [{ name: 'build.tar', digest: digestFromHex('b'.repeat(64)), infoHash: undefined }],
  provenance: { buildType: 'urn:rackswarm:publish:v1', builderId: 'urn:rackswarm:builder:unknown' },
})

test('sigstore finds our bundle good, and one that was changed bad', async (t) => {
  for (const algorithm of algorithms) {
    const signer = await newSigner(t, algorithm)
    const bundle = JSON.parse(signStatement(statement, signer).toString()) as Bundle
    verifyWithSigstore(bundle, signer)
    assert.equal(bundle.verificationMaterial.publicKey.hint, signer.id)
    const payload = Buffer.from(bundle.dsseEnvelope.payload, 'base64').toString().replace('"web"', '"dev"')
    const changed = structuredClone(bundle)
    changed.dsseEnvelope.payload = Buffer.from(payload).toString('base64')
    assert.throws(() => {
      verifyWithSigstore(changed, signer)
    }, /signature verification failed/)
    const other = await newSigner(t, algorithm)
    assert.throws(() => {
      verifyWithSigstore(bundle, other)
    }, /signature verification failed/)
  }
})

test('a bundle that sigstore made with the same key is good here', async (t) => {
  for (const algorithm of algorithms) {
    const signer = await newSigner(t, algorithm)
    const builder = new DSSEBundleBuilder({
      signer: {
        sign: async (data: Buffer) => ({
          signature: sign(algorithm === 'Ed25519' ? null : 'sha256', data, signer.privateKey),
          key: {
            $case: 'publicKey' as const,
            publicKey: signer.publicKey.export({ type: 'spki', format: 'pem' }),
            hint: signer.id,
          },
        }),
      },
      witnesses: [],
    })
    const made = await builder.create({ data: writeStatement(statement), type: statementType })
    const bytes = Buffer.from(JSON.stringify(bundleToJSON(made)))
    const { statement: read, key } = openBundle(bytes, [signer])
    assert.equal(key.id, signer.id)
    assert.deepEqual(read, statement)
    assert.throws(() =>
      openBundle(Buffer.from(bytes.toString().replace('"payload":"ey', '"payload":"ez')), [signer]),
    )
  }
})

interface Bundle {
  verificationMaterial: { publicKey: { hint: string } }
  dsseEnvelope: { payload: string }
}

/** Offline, with a key at hand: no log, no authority, no timestamp. @throws where it is not good */
function verifyWithSigstore(bundle: Bundle, { publicKey }: ReleaseSigner): void {
  const root: Parameters<typeof toTrustMaterial>[0] = {
    mediaType: 'application/vnd.dev.sigstore.trustedroot+json;version=0.1',
    certificateAuthorities: [],
    timestampAuthorities: [],
    tlogs: [],
    ctlogs: [],
  }
  const material = toTrustMaterial(root, () => ({
    publicKey: createPublicKey(publicKey.export({ type: 'spki', format: 'pem' })),
    validFor: () => true,
  }))
  const verifier = new Verifier(material, { tlogThreshold: 0, ctlogThreshold: 0, timestampThreshold: 0 })
  verifier.verify(toSignedEntity(bundleFromJSON({ ...bundle })))
}

async function newSigner(t: TestContext, algorithm: Algorithm): Promise<ReleaseSigner> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-keys-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const file = join(directory, 'key')
  await writeFile(file, generateReleaseKeys(algorithm).privatePem, { mode: 0o600 })
  return readReleaseSigner(file)
}

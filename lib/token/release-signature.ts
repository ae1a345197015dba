import type { KeyObject } from 'node:crypto'
import { sign, verify } from 'node:crypto'
import type { AttachedBundle } from '../protocol/dsse.ts'
import { bundleMaxBytes, parseBundle, preAuthEncoding, writeBundle } from '../protocol/dsse.ts'
import { ClientError } from '../protocol/errors.ts'
import type { ReleaseIdentity, Statement } from '../protocol/statement.ts'
import { checkRelease, parseStatement, statementType, writeStatement } from '../protocol/statement.ts'
import type { Algorithm } from './algorithms.ts'
import type { ReleaseKey, ReleaseSigner } from './release-keys.ts'

/**
 * Why a release is not taken for signed, and how much of it was right: of several signatures the one that came furthest is told.
 * `unsigned`: there is none. `unreadable`: no bundle, too large, or gone. `unknown_key`: by no key that is trusted. `bad_signature`: it names a trusted key, which did not
 * sign these bytes. `other_release`, `other_tag`: by a trusted key, for something else.
 * `too_many`: no good one among those that were looked at.
 */
export const signatureFaults = [
  'unsigned',
  'unreadable',
  'unknown_key',
  'bad_signature',
  'other_release',
  'other_tag',
  'too_many',
] as const
export type SignatureFault = (typeof signatureFaults)[number]

export type Verdict =
  | {
      readonly kind: 'signed'
      readonly keyId: string
      readonly statement: Statement
      /** Of the manifest that attaches the signature. */
      readonly attachedBy: string
    }
  | { readonly kind: 'unverified'; readonly fault: SignatureFault; readonly reason: string }

/** A signed statement as a sigstore bundle. @throws Error when it is larger than what is read */
export function signStatement(statement: Statement, signer: ReleaseSigner): Buffer {
  const payload = writeStatement(statement)
  const signed = preAuthEncoding(statementType, payload)
  const sig = sign(hashOf[signer.algorithm], signed, keyFor(signer.privateKey, signer.algorithm))
  const bundle = writeBundle(
    { payloadType: statementType, payload, signatures: [{ keyid: signer.id, sig }] },
    signer.id,
  )
  if (bundle.length > bundleMaxBytes)
    throw new Error(
      `Cannot sign: the statement names ${statement.subject.length} files, and its bundle has more than ${bundleMaxBytes} bytes`,
    )
  return bundle
}

/**
 * The statement of a bundle, if one of the keys has signed it. What the bundle says of its key is not believed: each key is tried.
 *
 * @throws ClientError `bad_bundle`, `bad_statement`, `unknown_key` or `bad_signature`
 */
export function openBundle(
  bytes: Uint8Array,
  keys: readonly ReleaseKey[],
): { statement: Statement; key: ReleaseKey } {
  const { payloadType, payload, signatures } = parseBundle(bytes)
  const signed = preAuthEncoding(payloadType, payload)
  const key = keys.find((known) => signatures.some(({ sig }) => isSignedBy(known, signed, sig)))
  if (!key) {
    const named = signatures.map(({ keyid }) => keyid).filter((keyid) => keyid !== '')
    if (keys.some(({ id }) => named.includes(id)))
      throw new ClientError('bad_signature', 'its signature does not fit what it says: it was changed')
    throw new ClientError(
      'unknown_key',
      `it is signed by a key that is not trusted here${named.length === 0 ? '' : `: ${named.map((keyid) => JSON.stringify(keyid.slice(0, 64)).slice(1, -1)).join(', ')}`}`,
    )
  }
  if (payloadType !== statementType)
    throw new ClientError(
      'bad_statement',
      `Cannot read statement: its type is ${JSON.stringify(payloadType.slice(0, 80))}, need ${statementType}`,
    )
  return { statement: parseStatement(payload), key }
}

/**
 * Whether one of the signatures that are attached to a release is by a key that is trusted, and for this release: the first that is. No more of
 * them are asked for then. What `attached` throws rises.
 */
export async function verifyRelease(
  release: ReleaseIdentity,
  attached: AsyncIterable<AttachedBundle>,
  { keys, anyTag }: { keys: readonly ReleaseKey[]; anyTag: boolean },
): Promise<Verdict> {
  let worst: { fault: SignatureFault; reason: string } = { fault: 'unsigned', reason: 'it is not signed' }
  const note = (fault: SignatureFault, reason: string) => {
    if (signatureFaults.indexOf(fault) > signatureFaults.indexOf(worst.fault)) worst = { fault, reason }
  }
  for await (const bundle of attached) {
    if ('fault' in bundle) {
      note(bundle.fault, bundle.reason)
      continue
    }
    try {
      const { statement, key } = openBundle(bundle.bytes, keys)
      checkRelease(statement, release, { anyTag })
      return { kind: 'signed', keyId: key.id, statement, attachedBy: bundle.digest }
    } catch (error) {
      if (!(error instanceof ClientError)) throw error
      note(faultOf(error), error.message)
    }
  }
  return { kind: 'unverified', ...worst }
}

function faultOf({ code }: ClientError): SignatureFault {
  return signatureFaults.find((fault) => fault === code) ?? 'unreadable'
}

function isSignedBy({ publicKey, algorithm }: ReleaseKey, signed: Buffer, sig: Uint8Array): boolean {
  try {
    return verify(hashOf[algorithm], signed, keyFor(publicKey, algorithm), sig)
  } catch {
    return false
  }
}

const hashOf = { ES256: 'sha256', Ed25519: null, RS256: 'RSA-SHA256' } as const satisfies Record<
  Algorithm,
  string | null
>

/** Sigstore has ECDSA signatures in DER, unlike tokens. */
function keyFor(key: KeyObject, algorithm: Algorithm) {
  return algorithm === 'ES256' ? { key, dsaEncoding: 'der' as const } : key
}

import { createPrivateKey, generateKeyPairSync, X509Certificate } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { thumbprintOf } from '../lib/protocol/thumbprint.ts'
import { isMissing, writeFileAtomic } from '../lib/runtime/files.ts'
import { selfSigned } from './self-signed.ts'

/** By what other agents know this host: a key, and a certificate that nobody has signed but itself. */
export interface HostIdentity {
  /** PEM, a secret. */
  readonly key: string
  /** PEM. */
  readonly certificate: string
  /** By which the host's tokens name it. */
  readonly thumbprint: string
}

/** Reads the identity from a file (PEM, 0600), or makes it. @throws Error naming the file where it cannot be used */
export async function openHostIdentity(file: string, host: string): Promise<HostIdentity> {
  const kept = await readFile(file, 'utf8').catch((error: unknown) => {
    if (isMissing(error)) return undefined
    throw error
  })
  if (kept !== undefined) return readIdentity(kept, file)
  const identity = createHostIdentity(host)
  await writeFileAtomic(file, identity.key + identity.certificate, { mode: 0o600 })
  return identity
}

/** A new one, which no file keeps. */
export function createHostIdentity(host: string): HostIdentity {
  const pair = generateKeyPairSync('ed25519')
  const certificate = new X509Certificate(selfSigned(pair, host))
  return {
    key: pair.privateKey.export({ type: 'pkcs8', format: 'pem' }),
    certificate: certificate.toString(),
    thumbprint: thumbprintOf(certificate.raw),
  }
}

function readIdentity(pem: string, file: string): HostIdentity {
  try {
    const key = createPrivateKey(pem)
    const certificate = new X509Certificate(pem.slice(pem.indexOf('-----BEGIN CERTIFICATE')))
    if (!certificate.checkPrivateKey(key)) throw new Error('its key is another than that of its certificate')
    return {
      key: key.export({ type: 'pkcs8', format: 'pem' }),
      certificate: certificate.toString(),
      thumbprint: thumbprintOf(certificate.raw),
    }
  } catch (cause) {
    throw new Error(`Cannot use ${file}: ${(cause as Error).message}; without the file a new one is made`, {
      cause,
    })
  }
}

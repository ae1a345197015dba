import type { KeyObject } from 'node:crypto'
import { createHash, generateKeyPairSync, randomBytes, randomUUID, sign } from 'node:crypto'
import { open, writeFile } from 'node:fs/promises'
import { issuer } from './tracker-server.ts'

const lifeSeconds = 24 * 3600

export interface Mint {
  /** A JWKS with the one key that all its tokens are signed with. */
  readonly keysFile: string
  /** Writes announce tokens (ES256), each for an infohash of its own: `infohash TAB jwt` a line. */
  write(file: string, count: number): Promise<void>
}

/** Signs without jose: it would take minutes for what a benchmark needs. */
export async function createMint(keysFile: string): Promise<Mint> {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const { kty, crv, x, y } = publicKey.export({ format: 'jwk' })
  // RFC 7638.
  const kid = createHash('sha256').update(JSON.stringify({ crv, kty, x, y })).digest('base64url')
  await writeFile(keysFile, JSON.stringify({ keys: [{ kty, crv, x, y, kid, alg: 'ES256', use: 'sig' }] }))
  return {
    keysFile,
    write: async (file, count) => {
      await using handle = await open(file, 'w', 0o600)
      for (let i = 0; i < count; i++) {
        const infohash = randomBytes(20).toString('hex')
        await handle.write(`${infohash}\t${mintToken(privateKey, kid, infohash, `host-${i}`)}\n`)
      }
    },
  }
}

function mintToken(key: KeyObject, kid: string, infohash: string, subject: string): string {
  const nowSeconds = Math.floor(Date.now() / 1000)
  const encode = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64url')
  const head = encode({ alg: 'ES256', kid, typ: 'announce+jwt' })
  const claims = encode({
    iss: issuer,
    aud: issuer,
    sub: subject,
    infohash,
    iat: nowSeconds,
    nbf: nowSeconds,
    exp: nowSeconds + lifeSeconds,
    jti: randomUUID(),
  })
  const signature = sign('sha256', Buffer.from(`${head}.${claims}`), { key, dsaEncoding: 'ieee-p1363' })
  return `${head}.${claims}.${signature.toString('base64url')}`
}

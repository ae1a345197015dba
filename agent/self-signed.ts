import type { KeyObject } from 'node:crypto'
import { randomBytes, sign } from 'node:crypto'

/** id-Ed25519 (RFC 8410). */
const ed25519 = Buffer.from([0x2b, 0x65, 0x70])
/** id-at-commonName (RFC 5280). */
const commonName = Buffer.from([0x55, 0x04, 0x03])
const commonNameMax = 64
/** It says of itself that it has no end (RFC 5280 section 4.1.2.5). */
const noEnd = '99991231235959Z'

/**
 * A certificate (X.509, DER) in which a key names itself, for those who know it by its hash and not by who signed it: Ed25519, without
 * extensions, valid for ever.
 */
export function selfSigned(
  { privateKey, publicKey }: { readonly privateKey: KeyObject; readonly publicKey: KeyObject },
  name: string,
): Buffer {
  const algorithm = sequence(node(0x06, ed25519))
  const attribute = sequence(node(0x06, commonName), node(0x0c, Buffer.from(name.slice(0, commonNameMax))))
  const names = sequence(node(0x31, attribute))
  // Positive, and of one length whatever comes.
  const serial = node(0x02, Buffer.concat([Buffer.from([0x01]), randomBytes(15)]))
  const validity = sequence(node(0x18, Buffer.from('20000101000000Z')), node(0x18, Buffer.from(noEnd)))
  const toBeSigned = sequence(
    serial,
    algorithm,
    names,
    validity,
    names,
    publicKey.export({ type: 'spki', format: 'der' }),
  )
  const signature = sign(null, toBeSigned, privateKey)
  return sequence(toBeSigned, algorithm, node(0x03, Buffer.concat([Buffer.from([0]), signature])))
}

function sequence(...parts: readonly Buffer[]): Buffer {
  return node(0x30, Buffer.concat(parts))
}

/** A node of DER (X.690): tag, length, content. */
function node(tag: number, content: Buffer): Buffer {
  const { length } = content
  const lengths =
    length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff]
  return Buffer.concat([Buffer.from([tag, ...lengths]), content])
}

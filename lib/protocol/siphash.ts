/**
 * SipHash-2-4 (Aumasson and Bernstein, 2012): a keyed 64-bit MAC for short messages. It allocates nothing, and works on
 * 32-bit halves, since a BigInt costs an allocation for each step.
 *
 * Key and message are given as little-endian 32-bit words: byte 0 is the low byte of word 0. `byteLength` says how many
 * bytes of `message` count; the bytes of the last word beyond it must be zero. The result's low half goes to `result[0]`,
 * its high half to `result[1]`.
 */
export function sipHash24(
  key: Int32Array,
  message: Int32Array,
  byteLength: number,
  result: Int32Array,
): void {
  const k0l = key[0] ?? 0
  const k0h = key[1] ?? 0
  const k1l = key[2] ?? 0
  const k1h = key[3] ?? 0
  let v0l = k0l ^ 0x70736575
  let v0h = k0h ^ 0x736f6d65
  let v1l = k1l ^ 0x6e646f6d
  let v1h = k1h ^ 0x646f7261
  let v2l = k0l ^ 0x6e657261
  let v2h = k0h ^ 0x6c796765
  let v3l = k1l ^ 0x79746573
  let v3h = k1h ^ 0x74656462
  const whole = byteLength >>> 3
  const rest = byteLength & 7
  // Whole blocks, then the block that ends in the length, then the finalization: one more turn without a block.
  for (let block = 0; block <= whole + 1; block++) {
    let low = 0
    let high = 0
    let rounds = 2
    if (block < whole) {
      low = message[2 * block] ?? 0
      high = message[2 * block + 1] ?? 0
    } else if (block === whole) {
      if (rest > 0) low = message[2 * block] ?? 0
      if (rest > 4) high = message[2 * block + 1] ?? 0
      high |= byteLength << 24
    } else {
      v2l ^= 0xff
      rounds = 4
    }
    v3l ^= low
    v3h ^= high
    for (; rounds > 0; rounds--) {
      let sum = (v0l + v1l) | 0
      v0h = (v0h + v1h + (sum >>> 0 < v1l >>> 0 ? 1 : 0)) | 0
      v0l = sum
      let turned = (v1l << 13) | (v1h >>> 19)
      v1h = ((v1h << 13) | (v1l >>> 19)) ^ v0h
      v1l = turned ^ v0l
      turned = v0l
      v0l = v0h
      v0h = turned

      sum = (v2l + v3l) | 0
      v2h = (v2h + v3h + (sum >>> 0 < v3l >>> 0 ? 1 : 0)) | 0
      v2l = sum
      turned = (v3l << 16) | (v3h >>> 16)
      v3h = ((v3h << 16) | (v3l >>> 16)) ^ v2h
      v3l = turned ^ v2l

      sum = (v0l + v3l) | 0
      v0h = (v0h + v3h + (sum >>> 0 < v3l >>> 0 ? 1 : 0)) | 0
      v0l = sum
      turned = (v3l << 21) | (v3h >>> 11)
      v3h = ((v3h << 21) | (v3l >>> 11)) ^ v0h
      v3l = turned ^ v0l

      sum = (v2l + v1l) | 0
      v2h = (v2h + v1h + (sum >>> 0 < v1l >>> 0 ? 1 : 0)) | 0
      v2l = sum
      turned = (v1l << 17) | (v1h >>> 15)
      v1h = ((v1h << 17) | (v1l >>> 15)) ^ v2h
      v1l = turned ^ v2l
      turned = v2l
      v2l = v2h
      v2h = turned
    }
    v0l ^= low
    v0h ^= high
  }
  result[0] = v0l ^ v1l ^ v2l ^ v3l
  result[1] = v0h ^ v1h ^ v2h ^ v3h
}

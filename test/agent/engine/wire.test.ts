import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import type { Block, WireHandler } from '../../../agent/engine/wire.ts'
import {
  blockBytes,
  handshakeBytes,
  isHandshakeStart,
  messages,
  ownBlockBytes,
  readHandshake,
  WireError,
  WireReader,
  writeBitfield,
  writeBlock,
  writeBlockHead,
  writeExtended,
  writeHandshake,
  writePiece,
  writeSimple,
} from '../../../agent/engine/wire.ts'

const runs = Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000)
const extendedBytesMax = 16 * 1024
const unknownBytesMax = 64 * 1024

/** What a stream is read with. */
interface Terms {
  readonly pieces: number
  readonly blockBytesMax: number
}

const terms: fc.Arbitrary<Terms> = fc.record({
  pieces: fc.constantFrom(1, 7, 8, 77, 2000),
  blockBytesMax: fc.constantFrom(50, blockBytes, ownBlockBytes),
})

test('a handshake written is read back', () => {
  const id = fc.uint8Array({ minLength: 20, maxLength: 20 })
  fc.assert(
    fc.property(id, id, (infoHash, peerId) => {
      const bytes = writeHandshake(infoHash, peerId)
      assert.equal(bytes.length, handshakeBytes)
      for (let length = 0; length <= bytes.length; length++)
        assert.ok(isHandshakeStart(bytes.subarray(0, length)))
      const seen = readHandshake(bytes)
      assert.deepEqual([hex(seen.infoHash), hex(seen.peerId)], [hex(infoHash), hex(peerId)])
      assert.ok(seen.fast && seen.extended)
      bytes.fill(0, 20, 28)
      const plain = readHandshake(bytes)
      assert.deepEqual([plain.fast, plain.extended], [false, false])
    }),
    { numRuns: 200 },
  )
})

test('what is no handshake is a WireError, and is known by the first byte that differs', () => {
  const good = writeHandshake(Buffer.alloc(20, 1), Buffer.alloc(20, 2))
  fc.assert(
    fc.property(fc.nat(19), fc.integer({ min: 1, max: 255 }), (at, change) => {
      const bytes = Buffer.from(good)
      bytes[at] = (bytes[at] ?? 0) ^ change
      assert.ok(isHandshakeStart(bytes.subarray(0, at)))
      assert.ok(!isHandshakeStart(bytes.subarray(0, at + 1)))
      assert.throws(() => readHandshake(bytes), WireError)
    }),
    { numRuns: 500 },
  )
  assert.throws(() => readHandshake(good.subarray(0, 67)), WireError)
  assert.throws(() => readHandshake(Buffer.concat([good, Buffer.of(0)])), WireError)
  assert.throws(() => readHandshake(new Uint8Array(0)), WireError)
})

test('messages written are read back, whatever the chunks cut', () => {
  fc.assert(
    fc.property(terms.chain(conversation), cuts, ({ limits, said }, at) => {
      const stream = Buffer.concat(said.map(({ bytes }) => bytes))
      assert.deepEqual(
        read(stream, limits, at),
        said.flatMap(({ events }) => events),
      )
    }),
    { numRuns: Math.ceil(runs / 10) },
  )
})

test('every byte by itself says the same', () => {
  fc.assert(
    fc.property(terms.chain(conversation), ({ limits, said }) => {
      const stream = Buffer.concat(said.map(({ bytes }) => bytes)).subarray(0, 3000)
      const each = Array.from(stream, (_, at) => at)
      assert.deepEqual(read(stream, limits, each), readPlainly(stream, limits))
    }),
    { numRuns: Math.ceil(runs / 100) },
  )
})

test(`a second parser reaches the same verdict on ${runs} spoilt streams, wherever they are cut`, () => {
  fc.assert(
    fc.property(
      spoiltConversation,
      cuts,
      fc.integer({ min: 1, max: 9 }),
      ({ limits, stream }, at, lentBytesMin) => {
        const plainly = readPlainly(stream, limits)
        assert.deepEqual(read(stream, limits, at), plainly)
        assert.deepEqual(read(stream, limits, at, lentBytesMin), plainly, 'read to where blocks belong')
      },
    ),
    { numRuns: runs },
  )
})

test('the two parsers agree on each length around the limits', () => {
  const limits = { pieces: 77, blockBytesMax: 50 }
  const lengths = [
    0,
    ...Array.from({ length: 16 }, (_, i) => i + 1),
    ...[
      limits.blockBytesMax + 9,
      extendedBytesMax,
      unknownBytesMax,
      0x7fffffff,
      0x80000000,
      0xffffffff,
    ].flatMap((length) => [length - 1, length, Math.min(length + 1, 0xffffffff)]),
  ]
  for (const { pieces, blockBytesMax } of [limits, { pieces: 800_000, blockBytesMax: ownBlockBytes }]) {
    const more = [
      Math.ceil(pieces / 8),
      Math.ceil(pieces / 8) + 1,
      Math.ceil(pieces / 8) + 2,
      blockBytesMax + 9,
    ]
    for (const length of [...lengths, ...more, blockBytesMax + 10]) {
      for (let id = 0; id < 24; id++) {
        const stream = Buffer.alloc(4 + Math.min(length, 110_000))
        stream.writeUInt32BE(length)
        if (stream.length > 4) stream[4] = id
        for (const end of [4, 5, 13, stream.length]) {
          const cut = stream.subarray(0, end)
          const expected = readPlainly(cut, { pieces, blockBytesMax })
          assert.deepEqual(
            read(cut, { pieces, blockBytesMax }, [3, 4, 5, 12]),
            expected,
            `${length} ${id} ${end}`,
          )
          assert.deepEqual(read(cut, { pieces, blockBytesMax }, []), expected, `${length} ${id} ${end}`)
        }
      }
    }
  }
})

test('a block that nobody wants any more still ends, and its memory is left alone', () => {
  const target = new Uint8Array(100)
  const told: string[] = []
  const reader = new WireReader(
    {
      ...silent,
      blockStart: () => target,
      blockBytes: (bytes) => told.push(`bytes ${bytes}`),
      blockEnd: () => told.push('end'),
      have: (piece) => told.push(`have ${piece}`),
    },
    8,
    blockBytes,
  )
  reader.push(writeBlockHead({ piece: 0, offset: 0, length: 100 }))
  reader.push(Buffer.alloc(40, 1))
  reader.drop()
  reader.push(Buffer.concat([Buffer.alloc(60, 2), writePiece(messages.have, 7)]))
  assert.deepEqual(told, ['bytes 40', 'bytes 60', 'end', 'have 7'])
  assert.deepEqual([...target], [...Buffer.alloc(40, 1), ...Buffer.alloc(60)])
  reader.push(writeBlockHead({ piece: 0, offset: 0, length: 100 }))
  reader.push(Buffer.alloc(100, 3))
  assert.deepEqual([...target], [...Buffer.alloc(100, 3)], 'the next block is taken again')
})

test('what is held between two chunks is no more than twice the message, and little of a block or behind a message', () => {
  const readers = 100
  const pieces = 64 * 1024
  const largest = Math.max(extendedBytesMax, pieces / 8) + 4
  const block = writeBlockHead({ piece: 0, offset: 0, length: ownBlockBytes })
  const extended = writeExtended(1, Buffer.alloc(extendedBytesMax - 2))
  const unfinished: readonly (readonly [string, number, ...Buffer[]])[] = [
    ['an extended message', 2 * largest, extended.subarray(0, -1)],
    ['a bitfield', 2 * largest, writeBitfield(Buffer.alloc(pieces / 8)).subarray(0, -1)],
    ['a block', 8192, block, Buffer.alloc(ownBlockBytes - 1)],
    ['an unknown message', 8192, Buffer.from([0, 1, 0, 0, 99]), Buffer.alloc(unknownBytesMax - 2)],
    ['what comes behind', 8192, extended, block, Buffer.alloc(ownBlockBytes), Buffer.from([0, 0, 0, 1])],
  ]
  for (const [name, max, ...parts] of unfinished) {
    const stream = Buffer.concat(parts)
    const before = arrayBytes()
    const held = Array.from({ length: readers }, () => {
      const reader = new WireReader(silent, pieces, ownBlockBytes)
      for (let at = 0; at < stream.length; at += 1448)
        reader.push(Buffer.from(stream.subarray(at, at + 1448)))
      return reader
    })
    const each = (arrayBytes() - before) / readers
    assert.equal(held.length, readers)
    assert.ok(each <= max, `${name}: ${each} bytes for each reader`)
  }
})

// What a stream says, as lines of text.

const silent: WireHandler = {
  choke: () => undefined,
  unchoke: () => undefined,
  interested: () => undefined,
  notInterested: () => undefined,
  have: () => undefined,
  bitfield: () => undefined,
  haveAll: () => undefined,
  haveNone: () => undefined,
  request: () => undefined,
  cancel: () => undefined,
  reject: () => undefined,
  suggest: () => undefined,
  allowedFast: () => undefined,
  blockStart: () => undefined,
  blockBytes: () => undefined,
  blockEnd: () => undefined,
  extended: () => undefined,
}

/** Blocks at an odd offset are not wanted: their bytes are counted and dropped. */
function isWanted({ offset }: Block): boolean {
  return offset % 2 === 0
}

function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex')
}

function blockLine(name: string, { piece, offset, length }: Block): string {
  return `${name} ${piece} ${offset} ${length}`
}

/** What the reader says of a stream that comes in chunks. */
/** With `lentBytesMin` as a socket does that fills what the reader lends it. */
function read(
  stream: Uint8Array,
  { pieces, blockBytesMax }: Terms,
  at: readonly number[],
  lentBytesMin = Infinity,
): string[] {
  const events: string[] = []
  let coming: { readonly block: Block; readonly target: Buffer | undefined; bytes: number } | undefined
  const simple = (name: string) => () => {
    events.push(name)
  }
  const piece = (name: string) => (number: number) => {
    events.push(`${name} ${number}`)
  }
  const block = (name: string) => (range: Block) => {
    events.push(blockLine(name, range))
  }
  const partOf = ({ target, bytes }: NonNullable<typeof coming>) =>
    target ? hex(target.subarray(0, bytes)) : `${bytes}`
  const handler: WireHandler = {
    choke: simple('choke'),
    unchoke: simple('unchoke'),
    interested: simple('interested'),
    notInterested: simple('notInterested'),
    have: piece('have'),
    bitfield: (bits) => {
      events.push(`bitfield ${hex(bits)}`)
    },
    haveAll: simple('haveAll'),
    haveNone: simple('haveNone'),
    request: block('request'),
    cancel: block('cancel'),
    reject: block('reject'),
    suggest: piece('suggest'),
    allowedFast: piece('allowedFast'),
    blockStart: (range) => {
      assert.equal(coming, undefined, 'one block at a time')
      events.push(blockLine('block', range))
      coming = { block: range, target: isWanted(range) ? Buffer.alloc(range.length) : undefined, bytes: 0 }
      return coming.target
    },
    blockBytes: (bytes) => {
      assert.ok(coming && bytes > 0)
      coming.bytes += bytes
    },
    blockEnd: () => {
      assert.ok(coming && coming.bytes === coming.block.length)
      events.push(`end ${partOf(coming)}`)
      coming = undefined
    },
    extended: (id, payload) => {
      events.push(`extended ${id} ${hex(payload)}`)
    },
  }
  const reader = new WireReader(handler, pieces, blockBytesMax, lentBytesMin)
  const bounds = [...new Set(at.map((cut) => cut % (stream.length + 1)))].sort((a, b) => a - b)
  let start = 0
  try {
    for (const end of [...bounds, stream.length]) {
      for (let lent = reader.lend(); lent !== undefined && start < end; lent = reader.lend()) {
        const bytes = Math.min(lent.length, end - start)
        lent.set(stream.subarray(start, start + bytes))
        start += bytes
        reader.push(lent.subarray(0, bytes))
      }
      const chunk = Uint8Array.from(stream.subarray(start, end))
      reader.push(chunk)
      // Sockets fill their buffers again: nothing may be read from a chunk later.
      chunk.fill(0xee)
      start = end
    }
  } catch (error) {
    if (!(error instanceof WireError)) throw error
    events.push('error')
    return events
  }
  if (coming) events.push(`so far ${partOf(coming)}`)
  return events
}

/** The least and the greatest length that a message may name, and the name. */
function ruleOf(id: number, { pieces, blockBytesMax }: Terms): readonly [number, number, string] {
  if ([0, 1, 2, 3, 14, 15].includes(id))
    return [
      1,
      1,
      ['choke', 'unchoke', 'interested', 'notInterested'][id] ?? (id === 14 ? 'haveAll' : 'haveNone'),
    ]
  if ([4, 13, 17].includes(id)) return [5, 5, id === 4 ? 'have' : id === 13 ? 'suggest' : 'allowedFast']
  if ([6, 8, 16].includes(id)) return [13, 13, id === 6 ? 'request' : id === 8 ? 'cancel' : 'reject']
  if (id === 5) return [1, Math.ceil(pieces / 8) + 1, 'bitfield']
  if (id === 7) return [10, blockBytesMax + 9, 'block']
  if (id === 20) return [1, extendedBytesMax, 'extended']
  return [1, unknownBytesMax, 'unknown']
}

/** The same from a parser that has the whole stream before it. */
function readPlainly(stream: Buffer, limits: Terms): string[] {
  const { pieces } = limits
  const events: string[] = []
  let rest = stream
  while (rest.length >= 4) {
    const length = rest.readUInt32BE(0)
    const body = rest.subarray(4, 4 + length)
    rest = rest.subarray(4 + length)
    if (length === 0) continue
    const [id] = body
    if (id === undefined) {
      const longest = Math.max(...[5, 7, 99].map((each) => ruleOf(each, limits)[1]))
      return length > longest ? [...events, 'error'] : events
    }
    const [min, max, name] = ruleOf(id, limits)
    if (length < min || length > max) return [...events, 'error']
    if (name === 'block' && body.length >= 9) {
      const block = { piece: body.readUInt32BE(1), offset: body.readUInt32BE(5), length: length - 9 }
      if (block.piece >= pieces) return [...events, 'error']
      const bytes = body.subarray(9)
      events.push(
        blockLine('block', block),
        `${bytes.length === block.length ? 'end' : 'so far'} ${isWanted(block) ? hex(bytes) : bytes.length}`,
      )
    }
    if (body.length < length) return events
    if (min >= 5 && body.readUInt32BE(1) >= pieces) return [...events, 'error']
    if (max === 1) events.push(name)
    else if (max === 5) events.push(`${name} ${body.readUInt32BE(1)}`)
    else if (max === 13 && min === 13)
      events.push(`${name} ${body.readUInt32BE(1)} ${body.readUInt32BE(5)} ${body.readUInt32BE(9)}`)
    else if (name === 'extended') {
      if (length === 1) return [...events, 'error']
      events.push(`extended ${body[1]} ${hex(body.subarray(2))}`)
    } else if (name === 'bitfield') {
      const bits = [...body.subarray(1)].map((byte) => byte.toString(2).padStart(8, '0')).join('')
      if (length !== max || bits.slice(pieces).includes('1')) return [...events, 'error']
      events.push(`bitfield ${hex(body.subarray(1))}`)
    }
  }
  return events
}

// Streams.

interface Said {
  readonly bytes: Buffer
  readonly events: readonly string[]
}

interface Conversation {
  readonly limits: Terms
  readonly said: readonly Said[]
}

const cuts = fc.array(fc.oneof(fc.nat(40), fc.nat()), { maxLength: 6 })

function conversation(limits: Terms): fc.Arbitrary<Conversation> {
  const piece = fc.oneof(fc.nat(limits.pieces - 1), fc.constant(limits.pieces - 1))
  const uint32 = fc.oneof(fc.nat(1 << 20), fc.constantFrom(0, 0x7fffffff, 0x80000000, 0xffffffff))
  const range = fc.record({ piece, offset: uint32, length: uint32 })
  const simple = fc
    .constantFrom('choke', 'unchoke', 'interested', 'notInterested', 'haveAll', 'haveNone')
    .map((name) => ({ bytes: writeSimple(messages[name]), events: [name] }))
  const pieces = fc.tuple(fc.constantFrom('have', 'suggest', 'allowedFast'), piece).map(([name, number]) => ({
    bytes: writePiece(messages[name], number),
    events: [`${name} ${number}`],
  }))
  const ranges = fc.tuple(fc.constantFrom('request', 'cancel', 'reject'), range).map(([name, block]) => ({
    bytes: writeBlock(messages[name], block),
    events: [blockLine(name, block)],
  }))
  const bitfields = fc.nat(255).map((fill) => {
    const bits = Buffer.alloc(Math.ceil(limits.pieces / 8), fill)
    const last = bits.length - 1
    bits[last] = (bits[last] ?? 0) & (0xff << (8 * bits.length - limits.pieces))
    return { bytes: writeBitfield(bits), events: [`bitfield ${hex(bits)}`] }
  })
  const blocks = fc
    .tuple(
      range,
      fc.oneof(
        { weight: 8, arbitrary: fc.integer({ min: 1, max: 50 }) },
        { weight: 1, arbitrary: fc.constantFrom(2000, limits.blockBytesMax) },
      ),
      fc.nat(255),
    )
    .map(([{ piece: number, offset }, bytes, fill]) => {
      const block = { piece: number, offset, length: Math.min(bytes, limits.blockBytesMax, 20_000) }
      const body = Buffer.alloc(block.length, Buffer.of(fill, 1, 2, 3, 4))
      return {
        bytes: Buffer.concat([writeBlockHead(block), body]),
        events: [blockLine('block', block), `end ${isWanted(block) ? hex(body) : body.length}`],
      }
    })
  const extended = fc
    .tuple(
      fc.nat(255),
      fc.oneof(
        { weight: 15, arbitrary: fc.uint8Array({ maxLength: 20 }) },
        { weight: 1, arbitrary: fc.constant(Buffer.alloc(extendedBytesMax - 2, 'd1:') as Uint8Array) },
      ),
    )
    .map(([id, payload]) => ({
      bytes: writeExtended(id, payload),
      events: [`extended ${id} ${hex(payload)}`],
    }))
  const nothing = fc.constantFrom<Said>(
    { bytes: Buffer.alloc(4), events: [] },
    { bytes: Buffer.concat([Buffer.from([0, 0, 0, 3, 99]), Buffer.of(1, 2)]), events: [] },
    { bytes: Buffer.from([0, 0, 0, 1, 9]), events: [] },
  )
  return fc
    .array(fc.oneof(simple, pieces, ranges, bitfields, blocks, extended, nothing), { maxLength: 8 })
    .map((said) => ({ limits, said }))
}

const edit = fc.record({
  kind: fc.constantFrom('set', 'set', 'flip', 'cut', 'put', 'end', 'length'),
  at: fc.oneof(fc.nat(60), fc.nat()),
  byte: fc.oneof(fc.nat(255), fc.nat(20)),
})

/** Good messages with a few bytes changed, cut out or put in; and bytes that were never good. */
const spoiltConversation = fc.oneof(
  {
    weight: 9,
    arbitrary: fc
      .tuple(terms.chain(conversation), fc.array(edit, { minLength: 1, maxLength: 3 }))
      .map(([{ limits, said }, edits]) => {
        let stream = Buffer.concat(said.map(({ bytes }) => bytes))
        for (const { kind, at, byte } of edits) {
          const index = at % (stream.length + 1)
          const [before, after] = [stream.subarray(0, index), stream.subarray(index)]
          if (kind === 'cut') stream = Buffer.concat([before, after.subarray(1 + (byte % 4))])
          else if (kind === 'put') stream = Buffer.concat([before, Buffer.of(byte), after])
          else if (kind === 'end') stream = Buffer.from(before)
          else if (kind === 'length') {
            // The last byte of a length: the message before it or behind it is read wrong.
            const start = startOf(said, at)
            if (start + 4 <= stream.length) stream[start + 3] = byte
          } else if (index < stream.length)
            stream[index] = kind === 'set' ? byte : (stream[index] ?? 0) ^ (1 << (byte % 8))
        }
        return { limits, stream }
      }),
  },
  {
    weight: 1,
    arbitrary: fc
      .tuple(terms, fc.uint8Array({ maxLength: 60 }))
      .map(([limits, bytes]) => ({ limits, stream: Buffer.from(bytes) })),
  },
)

function startOf(said: readonly Said[], which: number): number {
  const before = said.slice(0, which % Math.max(1, said.length))
  return before.reduce((sum, { bytes }) => sum + bytes.length, 0)
}

/** Bytes of all buffers that something still refers to. */
function arrayBytes(): number {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  collect()
  collect()
  return process.memoryUsage().arrayBuffers
}

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import type { Block, WireHandler } from '../../../agent/engine/wire.ts'
import { messages, ownBlockBytes, WireError, WireReader } from '../../../agent/engine/wire.ts'

const pieces = 77
const bitfieldBytes = Math.ceil(pieces / 8)
const runs = Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000)

/** What a stream says, an event a line, and `error` where it is not as it should be. */
function readWhole(stream: Uint8Array, cuts: readonly number[]): string[] {
  const events: string[] = []
  let block = Buffer.alloc(0)
  const say =
    (name: string) =>
    (value?: number | Block): void => {
      events.push(value === undefined ? name : `${name} ${JSON.stringify(value)}`)
    }
  const handler: WireHandler = {
    choke: say('choke'),
    unchoke: say('unchoke'),
    interested: say('interested'),
    notInterested: say('notInterested'),
    have: say('have'),
    bitfield: (bits) => {
      events.push(`bitfield ${Buffer.from(bits).toString('hex')}`)
    },
    haveAll: say('haveAll'),
    haveNone: say('haveNone'),
    request: say('request'),
    cancel: say('cancel'),
    reject: say('reject'),
    suggest: say('suggest'),
    allowedFast: say('allowedFast'),
    blockStart: ({ piece, offset, length }) => {
      events.push(`block ${piece} ${offset}`)
      block = Buffer.alloc(length)
      return block
    },
    blockBytes: () => undefined,
    blockEnd: () => {
      events.push(`bytes ${block.toString('hex')}`)
    },
    extended: (id, payload) => {
      events.push(`extended ${id} ${Buffer.from(payload).toString('hex')}`)
    },
  }
  const reader = new WireReader(handler, pieces, ownBlockBytes)
  const bounds = [0, ...cuts.map((cut) => cut % (stream.length + 1)).sort((a, b) => a - b), stream.length]
  try {
    for (let i = 1; i < bounds.length; i++) {
      // A copy: what is valid during the call only must not be kept.
      const chunk = Uint8Array.from(stream.subarray(bounds[i - 1], bounds[i]))
      reader.push(chunk)
      chunk.fill(0xee)
    }
  } catch (error) {
    assert.ok(error instanceof WireError, String(error))
    events.push('error')
  }
  return events
}

const names: Readonly<Record<number, string>> = Object.fromEntries(
  Object.entries(messages).map(([name, id]) => [id, name]),
)

/** The same from a parser that has the whole stream before it, message by message. */
function readSimply(stream: Buffer): string[] {
  const events: string[] = []
  for (let at = 0; stream.length - at >= 4;) {
    const length = stream.readUInt32BE(at)
    const body = stream.subarray(at + 4, at + 4 + length)
    at += 4 + length
    if (length === 0) continue
    const id = body[0]
    if (id === undefined) {
      if (length > ownBlockBytes + 9) events.push('error?')
      return events
    }
    const name = names[id]
    const piece = body.length >= 5 ? body.readUInt32BE(1) : 0
    const whole = body.length === length
    if (name === 'piece') {
      if (length < 10 || length > ownBlockBytes + 9) return [...events, 'error']
      if (body.length < 9) return events
      if (piece >= pieces) return [...events, 'error']
      events.push(`block ${piece} ${body.readUInt32BE(5)}`)
      if (!whole) return events
      events.push(`bytes ${body.subarray(9).toString('hex')}`)
    } else if (name === 'bitfield') {
      if (length > bitfieldBytes + 1) return [...events, 'error']
      if (!whole) return events
      const spare = ((body[length - 1] ?? 0) & 0b111) !== 0
      if (length !== bitfieldBytes + 1 || spare) return [...events, 'error']
      events.push(`bitfield ${body.subarray(1).toString('hex')}`)
    } else if (name === 'extended') {
      if (length > 16 * 1024) return [...events, 'error']
      if (!whole) return events
      if (length === 1) return [...events, 'error']
      events.push(`extended ${body[1] ?? 0} ${body.subarray(2).toString('hex')}`)
    } else if (name === undefined) {
      if (length > 64 * 1024) return [...events, 'error']
    } else {
      const wanted = { have: 5, suggest: 5, allowedFast: 5, request: 13, cancel: 13, reject: 13 }[name] ?? 1
      if (length !== wanted) return [...events, 'error']
      if (!whole) return events
      if (wanted > 1 && piece >= pieces) return [...events, 'error']
      if (wanted === 1) events.push(name)
      else if (wanted === 5) events.push(`${name} ${piece}`)
      else
        events.push(
          `${name} ${JSON.stringify({ piece, offset: body.readUInt32BE(5), length: body.readUInt32BE(9) })}`,
        )
    }
  }
  return events
}

const message = fc
  .tuple(
    fc.oneof(
      { weight: 8, arbitrary: fc.constantFrom(...Object.values(messages)) },
      { weight: 1, arbitrary: fc.nat(255) },
    ),
    fc.oneof(
      fc.uint8Array({ maxLength: 40 }),
      fc.nat(90).map((piece) => Uint8Array.of(0, 0, 0, piece)),
      fc
        .tuple(fc.nat(90), fc.uint8Array({ minLength: 8, maxLength: 8 }))
        .map(([piece, rest]) => Uint8Array.of(0, 0, 0, piece, ...rest)),
      fc.uint8Array({ minLength: bitfieldBytes, maxLength: bitfieldBytes }).map((bits) => {
        bits[bitfieldBytes - 1] = (bits[bitfieldBytes - 1] ?? 0) & 0xf8
        return bits
      }),
      fc.constant(new Uint8Array(0)),
    ),
    fc.oneof(
      { weight: 12, arbitrary: fc.constant(undefined) },
      { weight: 1, arbitrary: fc.constantFrom(0, 1, 5, 13, 70_000, 300_000, 0xffffffff) },
    ),
  )
  .map(([id, body, lie]) => {
    const head = Buffer.alloc(5)
    head.writeUInt32BE(lie ?? 1 + body.length)
    head[4] = id
    return Buffer.concat([head, body])
  })

test(`a stream means the same to a second parser, wherever it is cut, on ${runs} streams`, () => {
  fc.assert(
    fc.property(
      fc.array(message, { maxLength: 12 }),
      fc.array(fc.nat(400), { maxLength: 8 }),
      fc.nat(400),
      (parts, cuts, end) => {
        const all = Buffer.concat(parts)
        const stream = all.subarray(0, end < 100 ? end : undefined)
        const expected = readSimply(stream).filter((event) => event !== 'error?')
        const seen = readWhole(stream, cuts)
        // A length that nobody takes is refused before its id is there.
        if (seen.at(-1) === 'error' && seen.length === expected.length + 1) seen.pop()
        else if (expected.at(-1) === 'error') assert.equal(seen.at(-1), 'error')
        assert.deepEqual(
          seen.filter((event) => event !== 'error'),
          expected.filter((event) => event !== 'error'),
        )
        assert.deepEqual(
          readWhole(stream, []).filter((event) => event !== 'error'),
          seen.filter((event) => event !== 'error'),
        )
      },
    ),
    { numRuns: runs },
  )
})

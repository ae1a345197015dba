import fc from 'fast-check'
import { ClientError } from '../../lib/protocol/errors.ts'

/** Inputs for one fuzzed parser; ten of them make the 100,000 of npm test. `npm run soak -- fuzz` sets more. */
export const fuzzRuns = Number(process.env['RACKSWARM_FUZZ_RUNS'] ?? 100_000) / 10

/** A parser answers or throws ClientError, nothing else, whatever it is given. */
export function answersOrRefuses<Input>(inputs: fc.Arbitrary<Input>, parse: (input: Input) => unknown): void {
  fc.assert(
    fc.property(inputs, (input) => {
      try {
        parse(input)
      } catch (error) {
        if (!(error instanceof ClientError)) throw error
      }
    }),
    { numRuns: fuzzRuns },
  )
}

/** Random bytes, and good bytes with a few of them changed, cut out or put in: those get past the first check. */
export function spoilt(good: readonly Uint8Array[]): fc.Arbitrary<Uint8Array> {
  const edits = fc.array(
    fc.record({ at: fc.nat(), kind: fc.constantFrom('set', 'cut', 'put'), byte: fc.nat(255) }),
    { maxLength: 4 },
  )
  const edited = fc.tuple(fc.constantFrom(...good), edits).map(([bytes, changes]) => {
    const list = [...bytes]
    for (const { at, kind, byte } of changes) {
      const index = at % (list.length + 1)
      if (kind === 'set' && index < list.length) list[index] = byte
      else if (kind === 'cut') list.splice(index, 1)
      else list.splice(index, 0, byte)
    }
    return Uint8Array.from(list)
  })
  return fc.oneof(fc.uint8Array({ maxLength: 200 }), edited)
}

/** The same for text. */
export function spoiltText(good: readonly string[]): fc.Arbitrary<string> {
  return spoilt(good.map((text) => Buffer.from(text, 'latin1'))).map((bytes) =>
    Buffer.from(bytes).toString('latin1'),
  )
}

import type { TestContext } from 'node:test'
import { until } from './until.ts'

/** What clients do all the while, each stream one thing after the other. */
export interface Streams<Kind extends string> {
  /** How many of each kind have been done. */
  readonly done: Readonly<Record<Kind, number>>
  /** What failed, in words that begin with the kind. */
  readonly faults: readonly string[]
  /** Does it again and again from now on. */
  start(kind: Kind, act: () => Promise<unknown>): void
  /** Resolves when more of each kind has been done than `enough` says. */
  someOfEach(): Promise<void>
  /** Resolves when what is under way has been done. */
  end(): Promise<void>
}

/** They end with the test. */
export function createStreams<Kind extends string>(
  t: TestContext,
  enough: Readonly<Record<Kind, number>>,
): Streams<Kind> {
  const kinds = Object.keys(enough) as Kind[]
  const done = Object.fromEntries(kinds.map((kind) => [kind, 0])) as Record<Kind, number>
  const faults: string[] = []
  const streams: Promise<void>[] = []
  let isEnding = false
  t.after(() => {
    isEnding = true
  })
  const repeat = async (kind: Kind, act: () => Promise<unknown>) => {
    while (!isEnding)
      await act().then(
        () => done[kind]++,
        (error: unknown) => faults.push(`${kind}: ${error instanceof Error ? error.message : String(error)}`),
      )
  }
  return {
    done,
    faults,
    start: (kind, act) => {
      streams.push(repeat(kind, act))
    },
    someOfEach: async () => {
      const before = { ...done }
      await until('some of each', () => kinds.every((kind) => done[kind] > before[kind] + enough[kind]))
    },
    end: async () => {
      isEnding = true
      await Promise.all(streams)
    },
  }
}

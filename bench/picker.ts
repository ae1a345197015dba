import { Picker, shuffled } from '../agent/engine/picker.ts'
import { createSeededRandom } from '../lib/runtime/random.ts'
import type { Benchmark, Side } from './harness.ts'

const pieceLength = 1024 * 1024
const pieceCount = 1431
const neighbours = 30
const fetches = 20

/** What it costs an agent to decide which piece to ask a neighbour for. */
export const picker: Benchmark = {
  name: 'picker',
  summary: `fetches of ${pieceCount} pieces from ${neighbours} neighbours in process: each decision, and each piece that a neighbour tells of`,
  figures: [
    { name: 'decision', unit: 'µs' },
    { name: 'news', unit: 'µs' },
  ],
  ignoresSize: true,
  prepare: () =>
    Promise.resolve([
      sideOf('of the own rack', () => 0),
      sideOf('half of them far away', (neighbour) => neighbour % 2),
    ]),
}

function sideOf(name: string, distanceOf: (neighbour: number) => number): Side {
  return {
    name,
    settings: `${neighbours} neighbours that get pieces in a random order, one each before each decision; ${fetches} fetches, one request a piece`,
    run: () => Promise.resolve(timed(distanceOf)),
  }
}

function timed(distanceOf: (neighbour: number) => number): Record<string, number> {
  const random = createSeededRandom(7)
  let decisions = 0
  let decisionMs = 0
  let news = 0
  let newsMs = 0
  for (let fetch = 0; fetch < fetches; fetch++) {
    const own = new Picker({ pieceCount, pieceLength, length: pieceCount * pieceLength, random })
    const peers = Array.from({ length: neighbours }, (_, i) => own.join(distanceOf(i)))
    const orders = peers.map(() => shuffled(pieceCount, random))
    for (let round = 0; round < pieceCount; round++) {
      const toldMs = performance.now()
      for (const [i, peer] of peers.entries()) own.gains(peer.slot, orders[i]?.[round] ?? 0)
      news += peers.length
      newsMs += performance.now() - toldMs
      const fromMs = performance.now()
      const asks = peers.map((peer) =>
        own.next({ peer, bytesMax: pieceLength, mayBegin: true, anything: false, nowMs: round }),
      )
      decisionMs += performance.now() - fromMs
      decisions += peers.length
      for (const ask of asks) {
        if (ask === undefined) continue
        own.received(ask)
        own.done(ask.piece)
      }
    }
  }
  return { decision: (1000 * decisionMs) / decisions, news: (1000 * newsMs) / news }
}

// What the runs and the faults of the engine's soak have in common.
import assert from 'node:assert/strict'
import type { Blob } from '../../agent/engine/fixtures.ts'
import { blobFile, mebibyte, randomBlob, temporaryDirectory } from '../../agent/engine/fixtures.ts'
import type { Owner } from '../../support/tracker.ts'
import type { Host } from './start-host.ts'
import { startHost } from './start-host.ts'

export interface Round {
  readonly owner: Owner
  /** What the processes run. */
  readonly program: string
  readonly random: () => number
  wait(fromMs: number, toMs: number): Promise<void>
}

/** What a round saw that ended right. */
export interface Seen {
  /** Since the fetcher knew its first peer; beside bad peers, since it knew an honest one. */
  readonly tookMs: number
  /** Of the process under test. */
  readonly peakBytes: number
  readonly note?: string
}

export interface SwarmFiles {
  readonly blob: Blob
  readonly directory: string
  readonly torrent: string
  readonly seed: string
}

/** What the process under test may ever have resident. */
export const residentMax = 200 * mebibyte

export function between({ random }: Round, low: number, high: number): number {
  return low + random() * (high - low)
}

export async function createSwarmFiles({ owner }: Round, sizeBytes: number): Promise<SwarmFiles> {
  const directory = await temporaryDirectory(owner)
  const blob = randomBlob(sizeBytes)
  return {
    blob,
    directory,
    torrent: await blobFile(directory, 'torrent', blob.torrent),
    seed: await blobFile(directory, 'seed', blob.bytes),
  }
}

export async function startSeeder(
  round: Round,
  { torrent, seed }: SwarmFiles,
  { file = seed, uploadBytesPerSecond }: { file?: string; uploadBytesPerSecond?: number } = {},
): Promise<Host> {
  return startHost(round.owner, round.program, {
    kind: 'seed',
    torrent,
    file,
    uploadBytesPerSecond,
    seed: seedOf(round),
  })
}

let lastCopy = 0

export async function startFetcher(
  round: Round,
  { torrent, directory }: SwarmFiles,
  {
    file = `${directory}/copy-${++lastCopy}`,
    started,
  }: { file?: string; started?: (host: Pick<Host, 'pieces' | 'kill'>) => void } = {},
): Promise<Host> {
  return startHost(round.owner, round.program, { kind: 'fetch', torrent, file, seed: seedOf(round) }, started)
}

/** @throws Error where the file is not the blob's, or the process took too much memory */
export async function endedRight(fetcher: Host, { blob }: SwarmFiles, seconds = 90): Promise<Seen> {
  const { sha256, tookMs } = await fetcher.fetched(seconds)
  assert.equal(sha256, blob.sha256, 'the file is not that of the blob')
  return { tookMs, peakBytes: await boundedPeak(fetcher) }
}

/** @throws Error where it has ended, or took too much memory */
export async function boundedPeak(host: Host): Promise<number> {
  const peakBytes = await host.peakBytes()
  assert.ok(peakBytes < residentMax, `${Math.round(peakBytes / mebibyte)} MiB were resident`)
  return peakBytes
}

function seedOf({ random }: Round): number {
  return Math.floor(random() * 2 ** 32)
}

import { request } from 'undici'
import type { Dispatcher } from 'undici'
import { backoff, delay } from '../../lib/runtime/backoff.ts'

/** Requests at once; the server bounds all hosts together, so a host asks for little and often. */
export const webseedRequestsMax = 2
/** The next request goes out when the one before it ends so soon: no link waits, and what a slow one brings is whole sooner, and can be passed on. */
const aheadMs = 100
/** Bytes asked for in one request, at least a piece. */
export const webseedRequestBytes = 4 * 1024 * 1024
const headersTimeoutMs = 10_000
/** A body that stands still for this long is given up. */
const bodyTimeoutMs = 10_000
const retryAfterMaxMs = 60_000
/** Between tries where it fails: after an outage of the server the fleet goes on no later than this. Its leases bound how many try. */
export const webseedRetryMaxMs = 4_000
/** Sleeps are no shorter: a timer costs as much as the bytes of a chunk, and is a millisecond late. */
const paceMinMs = 10
/** Between looks for work when every missing piece is asked of someone else: at first short, since another range comes as soon as the server answers. */
const idleMinMs = 5
const idleMaxMs = 100

/** A run of missing pieces that this source has taken for itself. */
export interface Claim {
  readonly first: number
  readonly count: number
  /** Bytes `[start, end)` of the file. */
  readonly start: number
  readonly end: number
  /** Takes the bytes of the next piece of the run; false if its SHA-1 does not match. */
  accept(piece: number, bytes: Uint8Array): Promise<boolean>
  /** Gives back what was not accepted. */
  release(): void
}

export interface WebseedDeps {
  /** Once not, nothing more is asked for; what was asked for still comes. */
  isWanted(): boolean
  /** The next run to fetch, or undefined where nothing is free now. */
  claim(maxBytes: number): Claim | undefined
  pieceSize(piece: number): number
  /** What a piece is put together in, at least as large as each. */
  takeMemory(): Uint8Array
  /** It is not needed any more. */
  giveMemory(memory: Uint8Array): void
  received(bytes: number): void
  /** Milliseconds since some start. */
  monotonic: () => number
  random: () => number
  dispatcher: Dispatcher
}

/** A request that is under way. */
export interface WebseedRun {
  readonly bytes: number
  readonly startedAtMs: number
  received: number
}

/** Whether another request may go out beside it. */
export function endsSoon({ bytes, startedAtMs, received }: WebseedRun, nowMs: number): boolean {
  return received > 0 && ((bytes - received) / received) * (nowMs - startedAtMs) <= aheadMs
}

/**
 * Fetches missing pieces from a webseed by Range until it is aborted, or not wanted any more. A 503 waits as long as Retry-After says, any other
 * failure backs off; neither ends it, so that the last way stays open. Runs start at random places, so that the hosts
 * of a first wave pull different pieces.
 */
export async function runWebseed(
  url: string,
  lanes: WebseedLanes,
  deps: WebseedDeps,
  signal: AbortSignal,
): Promise<void> {
  await Promise.all(Array.from({ length: webseedRequestsMax }, () => runLane(url, deps, lanes, signal)))
}

/** What all webseeds of a torrent share, one after the other: each server has a URL of its own, and requests to the one before may be under way. */
export interface WebseedLanes {
  readonly pace: Pace
  readonly runs: Set<WebseedRun>
}

/** @param rate bytes a second of all requests together, or undefined */
export function createWebseedLanes(rate: () => number | undefined, monotonic: () => number): WebseedLanes {
  return { pace: createPace(rate, monotonic), runs: new Set() }
}

type Pace = (bytes: number, signal: AbortSignal) => Promise<void>

/** Keeps what comes within the rate; who is slower by itself does not wait. */
function createPace(rate: () => number | undefined, monotonic: () => number): Pace {
  let paidUntilMs = 0
  return async (bytes, signal) => {
    const bytesPerSecond = rate()
    if (bytesPerSecond === undefined) return
    const nowMs = monotonic()
    paidUntilMs = Math.max(paidUntilMs, nowMs) + (bytes * 1000) / bytesPerSecond
    if (paidUntilMs - nowMs >= paceMinMs) await delay(paidUntilMs - nowMs, signal)
  }
}

async function runLane(
  url: string,
  deps: WebseedDeps,
  lanes: WebseedLanes,
  signal: AbortSignal,
): Promise<void> {
  const { runs } = lanes
  const newWaits = () => backoff({ firstMs: 500, maxMs: webseedRetryMaxMs, random: deps.random })
  let waits = newWaits()
  let idleMs = idleMinMs
  while (!signal.aborted && deps.isWanted()) {
    const mayAsk = [...runs].every((run) => endsSoon(run, deps.monotonic()))
    const claim = mayAsk ? deps.claim(webseedRequestBytes) : undefined
    let waitMs: number | undefined
    if (claim === undefined) {
      waitMs = idleMs
      idleMs = Math.min(2 * idleMs, idleMaxMs)
    } else {
      idleMs = idleMinMs
      const run = { bytes: claim.end - claim.start, startedAtMs: deps.monotonic(), received: 0 }
      runs.add(run)
      try {
        const retryAfterMs = await fetchRun(url, claim, { ...deps, pace: lanes.pace, run }, signal)
        if (retryAfterMs === undefined) waits = newWaits()
        else waitMs = Math.max(retryAfterMs, waits.next().value)
      } catch {
        // Whatever it was (refused, cut, slow, wrong bytes): the URL holds a token, so the error is not told on.
        waitMs = waits.next().value
      } finally {
        runs.delete(run)
        claim.release()
      }
    }
    if (waitMs !== undefined) await delay(waitMs, signal).catch(() => undefined)
  }
}

/** @returns how long to wait where the server asked for it, undefined when the run was fetched */
async function fetchRun(
  url: string,
  claim: Claim,
  deps: WebseedDeps & Pick<WebseedLanes, 'pace'> & { run: WebseedRun },
  signal: AbortSignal,
): Promise<number | undefined> {
  const response = await request(url, {
    headers: { range: `bytes=${claim.start}-${claim.end - 1}` },
    signal,
    dispatcher: deps.dispatcher,
    headersTimeout: headersTimeoutMs,
    bodyTimeout: bodyTimeoutMs,
  })
  if (response.statusCode !== 206) {
    response.body.destroy()
    response.body.on('error', () => undefined)
    if (response.statusCode === 503 || response.statusCode === 429)
      return retryAfter(response.headers['retry-after'])
    throw new Error(`Cannot fetch from the webseed: status ${response.statusCode}, want 206`)
  }
  let piece = claim.first
  let memory: Uint8Array | undefined
  let filled = 0
  // One piece is checked and written while the next comes.
  let accepted: Promise<unknown> = Promise.resolve()
  try {
    for await (const chunk of response.body as AsyncIterable<Buffer>) {
      deps.received(chunk.length)
      deps.run.received += chunk.length
      for (let at = 0; at < chunk.length && piece < claim.first + claim.count;) {
        const size = deps.pieceSize(piece)
        const whole = (memory ??= deps.takeMemory())
        const part = chunk.subarray(at, at + size - filled)
        whole.set(part, filled)
        filled += part.length
        at += part.length
        if (filled < size) break
        // Until it is handed over it stays in `memory`, to be given back if the piece before it was wrong.
        await accepted
        memory = undefined
        filled = 0
        accepted = accept(claim, piece, whole.subarray(0, size)).finally(() => {
          deps.giveMemory(whole)
        })
        // It is waited for before the next; until then nobody need be told.
        accepted.catch(() => undefined)
        piece++
      }
      await deps.pace(chunk.length, signal)
    }
  } finally {
    if (memory) deps.giveMemory(memory)
    // The run must not be given back while a piece of it is on its way to the disk.
    await accepted
  }
  if (piece < claim.first + claim.count) throw new Error('The webseed sent less than asked for')
  return undefined
}

/** @throws Error when the bytes are not the piece's */
async function accept(claim: Claim, piece: number, bytes: Uint8Array): Promise<void> {
  if (!(await claim.accept(piece, bytes))) throw new Error(`Piece ${piece} of the webseed is wrong`)
}

function retryAfter(header: string | string[] | undefined): number {
  const seconds = Number(Array.isArray(header) ? header[0] : header)
  return Number.isFinite(seconds) && seconds > 0 ? Math.min(seconds * 1000, retryAfterMaxMs) : 1000
}

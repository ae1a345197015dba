import { randomUUID } from 'node:crypto'
import { delay } from '../../lib/runtime/backoff.ts'
import { monotonicMs } from '../../lib/runtime/clock.ts'
import type { StateEntry, StateStore } from './state-store.ts'
import { VersionConflict } from './state-store.ts'

/**
 * A name that one of several servers has at a time. It is a key of the state whose version grows whenever it is taken, renewed or given
 * up, and which is never deleted: so take names from a small set (`gc`, `repositories/3f`), not from what grows.
 *
 * No two clocks are compared: who wants a lease takes it from another only after it has itself seen the same version for as long as that
 * one's `ttlMs`, by its own monotonic clock. A server that was stopped in the middle of its work may still go on for a moment after its
 * lease has passed to another; where that does harm, the work shows `token`, and what it works on refuses a smaller one than it has seen.
 */
export interface Lease {
  /** The fencing token: greater than that of everyone who had the lease before. */
  readonly token: number
  /** Aborts when the lease could not be renewed in time, when another has it, or with the signal of the options. */
  readonly signal: AbortSignal
}

export interface LeaseOptions {
  /** How long it counts without being renewed, which is done three times as often. The longest time that nobody has it after its holder died. */
  readonly ttlMs: number
  /** For people: which server. */
  readonly holder: string
  readonly signal?: AbortSignal | undefined
  /** Milliseconds of a clock that never goes back. */
  readonly monotonic?: (() => number) | undefined
  /** 0 ≤ random() < 1. */
  readonly random: () => number
}

/** Another had the lease for as long as the caller would wait. */
export class LeaseBusy extends Error {
  override readonly name = 'LeaseBusy'
}

/**
 * Does short work while no other server does work under the same name. Within one server the callers should take turns first
 * (`lib/runtime/turn.ts`): they would only wait for each other here.
 *
 * @throws LeaseBusy after `waitMs`, what the state throws, and what the work throws
 */
export async function withLease<Result>(
  state: StateStore,
  name: string,
  options: LeaseOptions & { readonly waitMs: number },
  work: (lease: Lease) => Promise<Result>,
): Promise<Result> {
  const { monotonic = monotonicMs, random, signal = new AbortController().signal } = options
  const endMs = monotonic() + options.waitMs
  const contender = createContender(state, name, options)
  for (let waitMs = busyFirstMs; ; waitMs = Math.min(waitMs * 2, busyMaxMs, options.ttlMs / 4)) {
    signal.throwIfAborted()
    const taken = await contender.take()
    if (taken) {
      await using held = keep(state, taken, options)
      return await work(held)
    }
    if (monotonic() >= endMs)
      throw new LeaseBusy(
        `Cannot take the lease ${name}: ${contender.holder} has it, for ${options.waitMs} ms at least`,
      )
    await delay(waitMs * (0.5 + random() / 2), signal)
  }
}

/**
 * Does long work on one server at a time: waits for the lease, works, and waits again where it was lost; ends when the work has ended by
 * itself or the signal aborts. While the state cannot be reached it goes on trying.
 *
 * @throws what the work throws, unless its lease had ended
 */
export async function holdLease(
  state: StateStore,
  name: string,
  options: LeaseOptions & { readonly signal: AbortSignal },
  work: (lease: Lease) => Promise<void>,
): Promise<void> {
  const { ttlMs, random, signal } = options
  const contender = createContender(state, name, options)
  while (!signal.aborted) {
    // A state that is away comes back; until then nobody has the lease.
    const taken = await contender.take().catch(() => undefined)
    if (taken) {
      await using held = keep(state, taken, options)
      try {
        await work(held)
      } catch (error) {
        if (!held.signal.aborted) throw error
      }
      if (!held.signal.aborted) return
    }
    await delay((ttlMs / 4) * (0.5 + random() / 2), signal).catch(() => undefined)
  }
}

const busyFirstMs = 5
const busyMaxMs = 250
/** The part of a lease's time after which its holder gives up hope; what is left is for its work to notice. */
const hopeRatio = 0.9

interface LeaseRecord {
  /** Undefined once it was given up. */
  readonly holder?: string | undefined
  /** Tells this taking of the lease from every other one. */
  readonly hold: string
  readonly ttlMs: number
}

interface Taken {
  readonly key: string
  readonly record: LeaseRecord
  readonly version: number
  /** Before it was asked for; others count from a later moment. */
  readonly atMs: number
}

/** One that wants a lease; it remembers since when it has seen the same version. */
function createContender(
  state: StateStore,
  name: string,
  { ttlMs, holder, monotonic = monotonicMs }: LeaseOptions,
): { readonly holder: string; take(): Promise<Taken | undefined> } {
  const key = `leases/${name}`
  const record: LeaseRecord = { holder, hold: randomUUID(), ttlMs }
  let seen: { version: number; atMs: number } | undefined
  let other = 'somebody'
  const isFree = (entry: StateEntry | undefined, nowMs: number): boolean => {
    const theirs = entry?.value as LeaseRecord | undefined
    if (!entry || theirs?.holder === undefined) return true
    other = theirs.holder
    // Taken by a write of ours whose answer was lost.
    if (theirs.hold === record.hold) return true
    if (seen?.version !== entry.version) seen = { version: entry.version, atMs: nowMs }
    return nowMs - seen.atMs >= theirs.ttlMs
  }
  return {
    get holder() {
      return other
    },
    take: async () => {
      const entry = await state.get(key)
      const atMs = monotonic()
      if (!isFree(entry, atMs)) return undefined
      try {
        const version = await state.put(key, record, { ifVersion: entry?.version ?? 0 })
        seen = undefined
        return { key, record, version, atMs }
      } catch (error) {
        if (error instanceof VersionConflict) return undefined
        throw error
      }
    },
  }
}

/** Renews a lease until it is disposed, which gives it up. */
function keep(
  state: StateStore,
  taken: Taken,
  { ttlMs, signal, monotonic = monotonicMs }: LeaseOptions,
): Lease & AsyncDisposable {
  const { key, record } = taken
  let { version } = taken
  const ended = new AbortController()
  const lost = new AbortController()
  const lose = (why: string) => {
    lost.abort(new Error(`The lease ${key} is lost: ${why}`))
  }
  let timer: NodeJS.Timeout | undefined
  const countFrom = (atMs: number) => {
    clearTimeout(timer)
    timer = setTimeout(lose, atMs + ttlMs * hopeRatio - monotonic(), 'it could not be renewed in time')
  }
  countFrom(taken.atMs)

  const renew = async (): Promise<void> => {
    const atMs = monotonic()
    try {
      version = await state.put(key, record, { ifVersion: version })
      countFrom(atMs)
    } catch (error) {
      // Where the answer to the write before was lost, the key has its version.
      if (error instanceof VersionConflict) await lookAgain()
    }
  }
  const lookAgain = async (): Promise<boolean> => {
    const entry = await state.get(key).catch(() => undefined)
    if (!entry) return false
    const theirs = entry.value as LeaseRecord
    if (theirs.hold === record.hold) version = entry.version
    else lose(`${theirs.holder ?? 'nobody'} has it`)
    return theirs.hold === record.hold
  }
  const renewing = (async () => {
    const over = AbortSignal.any([ended.signal, lost.signal])
    for (;;) {
      await delay(ttlMs / 3, over).catch(() => undefined)
      if (over.aborted) return
      await renew()
    }
  })()
  const giveUp = async () => {
    const free: LeaseRecord = { hold: record.hold, ttlMs }
    await state.put(key, free, { ifVersion: version }).catch(async (error: unknown) => {
      if (error instanceof VersionConflict && (await lookAgain()))
        await state.put(key, free, { ifVersion: version }).catch(() => undefined)
      // Else it ends by itself.
    })
  }
  return {
    token: taken.version,
    signal: signal ? AbortSignal.any([lost.signal, signal]) : lost.signal,
    [Symbol.asyncDispose]: async () => {
      ended.abort()
      await renewing
      clearTimeout(timer)
      if (!lost.signal.aborted) await giveUp()
    },
  }
}

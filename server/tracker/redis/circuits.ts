import type { InfoHash } from '../../../lib/protocol/infohash.ts'

/** What is not asked: all swarms, or one. */
export type Scope = InfoHash | 'all'

/** Swarms that fail one after the other, with none between that does not, before all are taken to fail. */
const swarmsToOpen = 3
/** Swarms that are not asked while others are. When there are more, nothing is. */
const openSwarmsMax = 1000

/**
 * Circuit breakers: what did not answer is not asked again until somebody has seen that it does. One for everything, and one for each swarm,
 * since of a Cluster a part may be gone.
 */
export class Circuits {
  readonly #now: () => number
  #allSince: number | undefined
  readonly #swarms = new Map<InfoHash, number>()
  /** That have failed since one last did not. */
  readonly #failing = new Set<InfoHash>()

  /** `now`: milliseconds of a clock that never goes back. */
  constructor(now: () => number) {
    this.#now = now
  }

  /** Since when it has not been asked; undefined where it is. */
  openSince(infoHash: InfoHash): number | undefined {
    return this.#allSince ?? (this.#swarms.size > 0 ? this.#swarms.get(infoHash) : undefined)
  }

  /** Since when no swarm has been asked. */
  get allSince(): number | undefined {
    return this.#allSince
  }

  /** Since when any swarm has not been. */
  get anySince(): number | undefined {
    if (this.#swarms.size === 0) return this.#allSince
    return Math.min(this.#allSince ?? Infinity, ...this.#swarms.values())
  }

  get openSwarms(): number {
    return this.#swarms.size
  }

  succeeded(): void {
    if (this.#failing.size > 0) this.#failing.clear()
  }

  /** `everything`: what failed would fail for any swarm. @returns what has been opened now, if anything */
  failed(infoHash: InfoHash, everything: boolean): Scope | undefined {
    if (this.#allSince !== undefined) return undefined
    this.#failing.add(infoHash)
    if (everything || this.#failing.size >= swarmsToOpen || this.#swarms.size >= openSwarmsMax) {
      this.#allSince = this.#now()
      this.#failing.clear()
      return 'all'
    }
    if (this.#swarms.has(infoHash)) return undefined
    this.#swarms.set(infoHash, this.#now())
    return infoHash
  }

  close(scope: Scope): void {
    if (scope === 'all') this.#allSince = undefined
    else this.#swarms.delete(scope)
  }
}

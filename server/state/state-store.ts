/** A value with the version that a conditional write names. Versions grow by one with each write of a key, from 1. */
export interface StateEntry {
  readonly key: string
  readonly value: unknown
  readonly version: number
}

export type StateChange =
  { readonly kind: 'put'; readonly entry: StateEntry } | { readonly kind: 'delete'; readonly key: string }

/** Someone else wrote the key in between: read it again and decide again. */
export class VersionConflict extends Error {
  override readonly name = 'VersionConflict'
}

/**
 * Small control state: bootstrap tokens, hosts, deny lists, tokens, upload sessions. Keys are `/`-separated paths,
 * values are JSON. Every implementation promises, and one contract suite checks:
 *
 * - a write that has returned survives `kill -9` and power loss;
 * - `ifVersion: 0` means the key must not exist; otherwise the key must be at that version, or VersionConflict;
 * - `list` is sorted by key and pages with `after`;
 * - `watch` yields every change under the prefix that is made after the call, whichever server makes it, in order, until the signal
 *   aborts; what others changed shortly before the call may come too.
 *
 * A key that was deleted begins again at version 1. Leases (lease.ts) need versions that never repeat: they are not deleted.
 */
export interface StateStore extends AsyncDisposable {
  get(key: string): Promise<StateEntry | undefined>
  /** @returns the new version. @throws VersionConflict */
  put(key: string, value: unknown, options?: { ifVersion?: number }): Promise<number>
  /** @returns whether there was such a key. @throws VersionConflict */
  delete(key: string, options?: { ifVersion?: number }): Promise<boolean>
  list(prefix: string, options?: { after?: string; limit?: number }): Promise<StateEntry[]>
  watch(prefix: string, signal: AbortSignal): AsyncIterable<StateChange>
}

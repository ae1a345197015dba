import { LRUCache } from 'lru-cache'

/** What was read a moment ago, for all who ask for the same: one read serves those who come meanwhile and shortly after. */
export interface ReadCache<Value> {
  /** What is remembered under `key`, or what `read` finds. */
  get(key: string, read: () => Promise<Value | undefined>): Promise<Value | undefined>
  /** Call when what is under `key` has changed; a read that began before is not remembered then. */
  forget(key: string): void
}

export interface ReadCacheOptions<Value> {
  readonly entriesMax: number
  /** How long another server that shares the directory may go unnoticed. */
  readonly freshMs: number
  /** What is small enough to be kept; what is not there never is. */
  readonly keeps: (value: Value) => boolean
  readonly now: () => number
}

export function createReadCache<Value>({
  entriesMax,
  freshMs,
  keeps,
  now,
}: ReadCacheOptions<Value>): ReadCache<Value> {
  const cache = new LRUCache<string, { found: Promise<Value | undefined>; untilMs: number }>({
    max: entriesMax,
  })
  return {
    get: (key, read) => {
      const known = cache.get(key)
      if (known && known.untilMs > now()) return known.found
      // Entered before it is read, so that `forget` takes it out whenever it comes.
      const entry = { found: read(), untilMs: now() + freshMs }
      cache.set(key, entry)
      const drop = () => {
        if (cache.peek(key) === entry) cache.delete(key)
      }
      entry.found.then((value) => {
        if (value === undefined || !keeps(value)) drop()
      }, drop)
      return entry.found
    },
    forget: (key) => {
      cache.delete(key)
    },
  }
}

/** Runs work one after the other, in the order of asking; work that fails does not keep the next from running. */
export function createTurn(): <Result>(work: () => Promise<Result>) => Promise<Result> {
  let last: Promise<unknown> = Promise.resolve()
  return async (work) => {
    const mine = last.then(work)
    last = mine.catch(() => undefined)
    return mine
  }
}

/** Runs work on one key in the order of asking; on different keys at once. */
export type KeyedTurn = <Result>(key: string, work: () => Promise<Result>) => Promise<Result>

export function createKeyedTurn(): KeyedTurn {
  const last = new Map<string, Promise<unknown>>()
  return async (key, work) => {
    const mine = (last.get(key) ?? Promise.resolve()).then(work, work)
    const settled = mine.catch(() => undefined)
    last.set(key, settled)
    try {
      return await mine
    } finally {
      if (last.get(key) === settled) last.delete(key)
    }
  }
}

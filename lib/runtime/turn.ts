/** Runs work one after the other, in the order of asking; work that fails does not keep the next from running. */
export function createTurn(): <Result>(work: () => Promise<Result>) => Promise<Result> {
  let last: Promise<unknown> = Promise.resolve()
  return async (work) => {
    const mine = last.then(work)
    last = mine.catch(() => undefined)
    return mine
  }
}

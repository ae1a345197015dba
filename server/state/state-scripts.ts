import { readScript } from '../redis/script-file.ts'

const state = readScript(new URL('./scripts/state.lua', import.meta.url))

/** What is done to a state in Redis, each in one step. */
export const stateScripts = {
  get: readScript(new URL('./scripts/get.lua', import.meta.url), state),
  list: readScript(new URL('./scripts/list.lua', import.meta.url), state),
  put: readScript(new URL('./scripts/put.lua', import.meta.url), state),
  delete: readScript(new URL('./scripts/delete.lua', import.meta.url), state),
  changes: readScript(new URL('./scripts/changes.lua', import.meta.url), state),
  position: readScript(new URL('./scripts/position.lua', import.meta.url), state),
  claim: readScript(new URL('./scripts/claim.lua', import.meta.url), state),
  restore: readScript(new URL('./scripts/restore.lua', import.meta.url), state),
  /** Of other keys than the others: it makes what they look for. */
  begin: readScript(new URL('./scripts/begin.lua', import.meta.url)),
}
export type StateScript = Exclude<keyof typeof stateScripts, 'begin' | 'claim' | 'restore'>

/** Where a state stands in Redis: all of it in one slot of a Cluster, so that a script can do a whole write. */
export interface StateKeys {
  /** Generation, values, index, log: what every script is given. */
  readonly all: readonly [string, string, string, string]
  /** Up to which change each generation that was lost has been put back. */
  readonly restored: string
  /** While there is no generation: up to which change of one that was lost somebody puts it back. */
  readonly refill: string
  /** Where it is said that there are changes. */
  readonly channel: string
}

export function stateKeys(prefix: string): StateKeys {
  const of = (name: string) => `${prefix}{state}:${name}`
  return {
    all: [of('generation'), of('values'), of('keys'), of('log')],
    restored: of('restored'),
    refill: of('refill'),
    channel: of('changed'),
  }
}

import type { Logger } from '../../lib/runtime/log.ts'
import { follow } from '../state/follow.ts'
import type { StateStore } from '../state/state-store.ts'
import { ApiError } from './api-error.ts'
import type { HostRecord } from './host-recall.ts'

/**
 * The hosts that are enrolled and not revoked, and no more than `hostsMax` of them, however many servers enrol at once. All of them hear of
 * hosts in the order in which they were written, so each finds the same ones to be too many: a host is written first, and taken back by its
 * server where it was one of them.
 */
export interface EnrolledHosts extends AsyncDisposable {
  /** Before anything is done for a host that is new. @throws ApiError where there is no room */
  checkRoom(host: string): void
  /** Writes down a host that enrols. @returns once it counts. @throws VersionConflict; ApiError where it is new and one too many */
  write(host: string, record: HostRecord, ifVersion: number): Promise<void>
}

const prefix = 'hosts/'
/** A write returns when its server has heard of it; this is for one that has to read all again first. */
const heardWithinMs = 5000

export async function followEnrolledHosts({
  state,
  hostsMax,
  log,
}: {
  state: StateStore
  hostsMax: number
  log: Logger
}): Promise<EnrolledHosts> {
  const names = new Set<string>()
  /** Hosts that this server writes, until it hears of them itself: then how many there are. */
  const awaited = new Set<{ host: string; heard: (count: number) => void }>()
  const hearOf = (host: string) => {
    for (const waiting of awaited) if (waiting.host === host) waiting.heard(names.size)
  }
  const following = await follow({
    state,
    prefix,
    loaded: async (entries) => {
      const found: string[] = []
      for await (const { key, value } of entries)
        if (!(value as HostRecord).revoked) found.push(key.slice(prefix.length))
      names.clear()
      for (const host of found) names.add(host)
      for (const { host } of awaited) if (names.has(host)) hearOf(host)
    },
    changed: (change) => {
      const host = (change.kind === 'put' ? change.entry.key : change.key).slice(prefix.length)
      if (change.kind === 'delete' || (change.entry.value as HostRecord).revoked) {
        names.delete(host)
        return
      }
      names.add(host)
      hearOf(host)
    },
    log,
  })
  const tooMany = (host: string) =>
    new ApiError(507, 'TOO_MANY_HOSTS', `Cannot enrol ${host}: ${hostsMax} hosts are enrolled`, {
      hint: 'Raise enrolment.hosts_max, or revoke hosts that are gone: deployctl hosts revoke HOST.',
    })
  return {
    checkRoom: (host) => {
      if (names.size >= hostsMax && !names.has(host)) throw tooMany(host)
    },
    write: async (host, record, ifVersion) => {
      const key = `${prefix}${host}`
      if (ifVersion > 0) {
        await state.put(key, record, { ifVersion })
        return
      }
      const counted = Promise.withResolvers<number>()
      const waiting = { host, heard: counted.resolve }
      awaited.add(waiting)
      // One that is gone again before this server has heard of it, it never hears of.
      const timer = setTimeout(() => {
        counted.resolve(names.size)
      }, heardWithinMs)
      try {
        const version = await state.put(key, record, { ifVersion })
        if ((await counted.promise) <= hostsMax) return
        await state.delete(key, { ifVersion: version })
      } finally {
        clearTimeout(timer)
        awaited.delete(waiting)
      }
      throw tooMany(host)
    },
    [Symbol.asyncDispose]: () => following[Symbol.asyncDispose](),
  }
}

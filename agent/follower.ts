import type { HostReport, ReportReply } from '../lib/client/api.ts'
import { RequestError } from '../lib/client/http.ts'
import type { ServerClient } from '../lib/client/server-client.ts'
import type { Digest } from '../lib/protocol/digest.ts'
import { parseDigest } from '../lib/protocol/digest.ts'
import { parseReference } from '../lib/protocol/reference.ts'
import { backoff, delay } from '../lib/runtime/backoff.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { Credential } from './credential.ts'
import type { ReleaseFetcher } from './release-fetcher.ts'

export interface FollowerDeps {
  server: Pick<ServerClient, 'report'>
  credential: Pick<Credential, 'ready' | 'reason'>
  fetcher: Pick<ReleaseFetcher, 'fetch'>
  /** Whether a digest is exposed under a reference and all its blobs are there. */
  isHeld(reference: string, digest: Digest): Promise<boolean>
  /** What to report now. */
  describe(): HostReport
  replied(reply: ReportReply): void
  now: () => number
  random: () => number
  log: Logger
  observe: { reported(outcome: 'ok' | 'refused' | 'unreachable'): void }
}

/** Reports to the server and fetches what the followed tags point to. */
export interface Follower {
  readonly lastReportAt: number | undefined
  readonly lastReportError: string | undefined
  /** Followed references for which the server has nothing for this host. */
  readonly absent: ReadonlySet<string>
  run(signal: AbortSignal): Promise<void>
}

const reportTimeoutMs = 15_000

export function createFollower(
  options: { follow: readonly string[]; jitterMs: number },
  deps: FollowerDeps,
): Follower {
  const { now, random, log } = deps
  const absent = new Set<string>()
  /** The digest that is being fetched for each reference. */
  const under = new Map<string, Digest>()
  let lastReportAt: number | undefined
  let lastReportError: string | undefined

  const consider = async (reference: string, digest: Digest, signal: AbortSignal) => {
    if (under.get(reference) === digest) return
    under.set(reference, digest)
    try {
      if (await deps.isHeld(reference, digest)) return
      await delay(random() * options.jitterMs, signal)
      if (under.get(reference) !== digest) return
      log.info({ reference, digest }, 'followed reference has changed: fetching it')
      await deps.fetcher.fetch(parseReference(reference), digest, { stubborn: true, signal })
    } catch (error) {
      // A fetch that gave way to a newer digest, or the end of the agent.
      log.debug({ reference, digest, error: (error as Error).message }, 'followed fetch ended')
    } finally {
      if (under.get(reference) === digest) under.delete(reference)
    }
  }

  const act = (reply: ReportReply, signal: AbortSignal) => {
    deps.replied(reply)
    for (const reference of options.follow) {
      const fixed = parseReference(reference).digest
      const digest = fixed ?? reply.tags[reference]
      if (digest === null || digest === undefined) {
        if (!absent.has(reference))
          log.warn({ reference }, 'there is no such tag, or this host may not have it')
        absent.add(reference)
        continue
      }
      absent.delete(reference)
      void consider(reference, parseDigest(digest), signal)
    }
  }

  return {
    get lastReportAt() {
      return lastReportAt
    },
    get lastReportError() {
      return lastReportError ?? deps.credential.reason
    },
    absent,
    run: async (signal) => {
      let waits = backoff({ firstMs: 500, maxMs: 5_000, random })
      try {
        await deps.credential.ready(signal)
        for (;;) {
          let waitMs: number
          try {
            const reply = await deps.server.report(
              deps.describe(),
              AbortSignal.any([signal, AbortSignal.timeout(reportTimeoutMs)]),
            )
            if (lastReportError !== undefined) log.info({}, 'the server takes reports again')
            lastReportAt = now()
            lastReportError = undefined
            deps.observe.reported('ok')
            waits = backoff({ firstMs: 500, maxMs: 5_000, random })
            waitMs = reply.reportIntervalSeconds * 1000 * (0.8 + random() * 0.4)
            act(reply, signal)
          } catch (error) {
            signal.throwIfAborted()
            waitMs = waits.next().value
            note(error)
          }
          await delay(waitMs, signal)
        }
      } catch (error) {
        if (!signal.aborted) throw error
      }
    },
  }

  function note(error: unknown) {
    const refused = error instanceof RequestError && error.status < 500
    deps.observe.reported(refused ? 'refused' : 'unreachable')
    const message = (error as Error).message
    if (lastReportError === message) return
    lastReportError = message
    if (error instanceof RequestError && error.status === 401) {
      // Not enrolled anew by itself: that would undo a revocation. What is here goes on being seeded while tokens last;
      // the tracker lets them run out.
      log.error(
        { reason: message },
        'the server refuses the credential of this host: if it was not revoked, remove credential.json and start the agent again',
      )
    } else {
      log.warn({ reason: message }, 'report did not reach the server: trying again')
    }
  }
}

import type { Logger } from '../../../lib/runtime/log.ts'
import { delay } from '../../../lib/runtime/backoff.ts'
import type { OnOneServer } from '../../state/on-one-server.ts'
import type { BlobStore } from '../blob-store.ts'
import type { PullThrough } from './pull-through.ts'
import type { UpstreamClient } from './upstream-client.ts'
import { UpstreamError } from './upstream-error.ts'

export interface ReconcileDeps {
  readonly upstreams: readonly UpstreamClient[]
  readonly pullThrough: Pick<PullThrough, 'pull' | 'upstreamOf'>
  readonly store: BlobStore
  readonly intervalMs: number
  readonly random: () => number
  readonly log: Logger
  readonly onOneServer: OnOneServer
}

/**
 * Looks at every tag of the upstreams at intervals, and pulls those that are others here: what a lost notification would have said. Tags
 * that were pushed here stay as they are.
 */
export function startReconcile(deps: ReconcileDeps): AsyncDisposable {
  const { upstreams, intervalMs, random, log } = deps
  const ended = new AbortController()
  const loop = async (signal: AbortSignal) => {
    for (;;) {
      for (const upstream of upstreams) {
        const startedAtMs = performance.now()
        const { repositories, tags, failed } = await scan(upstream, deps, signal)
        const tookMs = Math.round(performance.now() - startedAtMs)
        log.info({ upstream: upstream.name, repositories, tags, failed, tookMs }, 'upstream reconciled')
      }
      await delay(intervalMs * (0.8 + 0.4 * random()), signal)
    }
  }
  const running = deps.onOneServer('upstream-reconcile', ended.signal, loop).catch((error: unknown) => {
    if (!ended.signal.aborted) log.error({ err: error }, 'reconciling has ended')
  })
  return {
    [Symbol.asyncDispose]: async () => {
      ended.abort(new Error('the server is ending'))
      await running
    },
  }
}

async function scan(upstream: UpstreamClient, deps: ReconcileDeps, signal: AbortSignal) {
  const { pullThrough, log } = deps
  const counts = { repositories: 0, tags: 0, failed: 0 }
  /** @returns undefined where it failed; the next scan tries again. */
  const attempt = async <Result>(what: object, work: () => Promise<Result>): Promise<Result | undefined> => {
    try {
      return await work()
    } catch (error) {
      signal.throwIfAborted()
      counts.failed++
      const reason = error instanceof UpstreamError ? { reason: error.message } : { err: error }
      log.warn({ upstream: upstream.name, ...what, ...reason }, 'not reconciled')
      return undefined
    }
  }
  const repositories = (await attempt({}, () => repositoriesOf(upstream, deps, signal))) ?? []
  for (const repository of repositories) {
    if (pullThrough.upstreamOf(repository) !== upstream) continue
    counts.repositories++
    const tags = (await attempt({ repository }, () => upstream.listTags(repository, { signal }))) ?? []
    for (const tag of tags) {
      counts.tags++
      await attempt({ repository, tag }, () =>
        pullThrough.pull({ repository, reference: tag, keepOwn: true, signal }),
      )
    }
  }
  return counts
}

/** Those that are named; for patterns what the catalog of the upstream says, if it has one, and what is here. */
async function repositoriesOf(
  upstream: UpstreamClient,
  { store }: ReconcileDeps,
  signal: AbortSignal,
): Promise<string[]> {
  const named = upstream.repositories.filter((pattern) => !pattern.endsWith('*'))
  if (named.length === upstream.repositories.length) return named
  const known = [
    ...(await store.listRepositories()),
    ...((await upstream.listRepositories({ signal })) ?? []),
  ]
  return [...new Set([...named, ...known.filter((repository) => upstream.covers(repository))])].sort()
}

import type { AddressInfo } from 'node:net'
import { fastify } from 'fastify'
import type { Registry } from 'prom-client'
import { delay } from '../lib/runtime/backoff.ts'

/** What /readyz asks of a part: nothing if it can work, else why not, or that it works worse than it should. */
export type ReadinessCheck = () => Readiness | Promise<Readiness>
export type Readiness = string | { readonly degraded: string } | undefined

export interface HealthPort extends AsyncDisposable {
  readonly origin: string
}

/** /livez, /readyz, /metrics and /stats.json on a port of their own: no secrets, no authentication. */
export async function startHealthPort(options: {
  address: { host: string; port: number }
  registry: Registry
  checks: Readonly<Record<string, ReadinessCheck>>
  stats: () => unknown
  reusePort?: boolean
}): Promise<HealthPort> {
  const { registry, checks, stats, reusePort = false } = options
  const app = fastify({ logger: false, forceCloseConnections: true })
  app.get('/livez', () => ({ status: 'ok' }))
  app.get('/readyz', async (_request, reply) => {
    const { status, results } = await readChecks(checks)
    return reply.code(status === 'not ready' ? 503 : 200).send({ status, checks: results })
  })
  app.get('/metrics', async (_request, reply) =>
    reply.type(registry.contentType).send(await registry.metrics()),
  )
  app.get('/stats.json', () => stats())
  await app.ready()
  await new Promise<void>((resolve, reject) => {
    app.server.once('error', reject)
    app.server.listen({ ...options.address, reusePort }, resolve)
  })
  const { host } = options.address
  const { port } = app.server.address() as AddressInfo
  return {
    origin: `http://${host.includes(':') ? `[${host}]` : host}:${port}`,
    [Symbol.asyncDispose]: async () => {
      const closed = new Promise((resolve) => app.server.close(resolve))
      app.server.closeAllConnections()
      await closed
      await app.close()
    },
  }
}

/** Asks all of them: how it stands in all, and with each part. */
export async function readChecks(checks: Readonly<Record<string, ReadinessCheck>>): Promise<{
  readonly status: 'ok' | 'degraded' | 'not ready'
  readonly results: Record<string, string>
}> {
  const results = await Promise.all(
    Object.entries(checks).map(async ([name, check]) => [name, await check()] as const),
  )
  return {
    status: statusOf(results.map(([, result]) => result)),
    results: Object.fromEntries(results.map(([name, result]) => [name, textOf(result)])),
  }
}

/**
 * A server that works worse stays in rotation: where all of them have lost the same thing, taking all out would make of a nuisance an
 * outage.
 */
function statusOf(results: readonly Readiness[]): 'ok' | 'degraded' | 'not ready' {
  if (results.some((result) => typeof result === 'string')) return 'not ready'
  return results.every((result) => result === undefined) ? 'ok' : 'degraded'
}

function textOf(result: Readiness): string {
  if (result === undefined) return 'ok'
  return typeof result === 'string' ? result : `degraded: ${result.degraded}`
}

/** Ready where the work succeeds. */
export function succeeds(work: () => Promise<unknown>): ReadinessCheck {
  return async () =>
    work().then(
      () => undefined,
      (error: unknown) => (error instanceof Error ? error.message : String(error)),
    )
}

/** The same for a file system, which may hang: it must not hang who asks, nor take a thread for each question. One at a time. */
export function succeedsInTime(work: () => Promise<unknown>): ReadinessCheck {
  const check = succeeds(work)
  let underWay: Promise<Readiness> | undefined
  return async () => {
    underWay ??= Promise.resolve(check()).finally(() => {
      underWay = undefined
    })
    const over = new AbortController()
    const late = delay(checkMs, over.signal).then(
      () => `no answer within ${checkMs} ms`,
      () => undefined,
    )
    try {
      return await Promise.race([underWay, late])
    } finally {
      over.abort()
    }
  }
}

const checkMs = 2000

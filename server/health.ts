import type { AddressInfo } from 'node:net'
import { fastify } from 'fastify'
import type { Registry } from 'prom-client'

/** What /readyz asks of a part: nothing if it can work, else why not. */
export type ReadinessCheck = () => string | undefined | Promise<string | undefined>

export interface HealthPort extends AsyncDisposable {
  readonly origin: string
}

/** /livez, /readyz, /metrics and /stats.json on a port of their own: no secrets, no authentication. */
export async function startHealthPort(options: {
  address: { host: string; port: number }
  registry: Registry
  checks: Readonly<Record<string, ReadinessCheck>>
  stats: () => unknown
}): Promise<HealthPort> {
  const { registry, checks, stats } = options
  const app = fastify({ logger: false, forceCloseConnections: true })
  app.get('/livez', () => ({ status: 'ok' }))
  app.get('/readyz', async (_request, reply) => {
    const results = await Promise.all(
      Object.entries(checks).map(async ([name, check]) => [name, (await check()) ?? 'ok'] as const),
    )
    const ready = results.every(([, result]) => result === 'ok')
    return reply
      .code(ready ? 200 : 503)
      .send({ status: ready ? 'ok' : 'not ready', checks: Object.fromEntries(results) })
  })
  app.get('/metrics', async (_request, reply) =>
    reply.type(registry.contentType).send(await registry.metrics()),
  )
  app.get('/stats.json', () => stats())
  await app.listen(options.address)
  const { host } = options.address
  const { port } = app.server.address() as AddressInfo
  return {
    origin: `http://${host.includes(':') ? `[${host}]` : host}:${port}`,
    [Symbol.asyncDispose]: () => app.close(),
  }
}

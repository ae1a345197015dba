// What stands in front of a registry in the world: a proxy that wants tokens, redirects, breaks, or lies.
import { once } from 'node:events'
import type { IncomingMessage, RequestListener, ServerResponse } from 'node:http'
import { createServer, request as httpRequest } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'

export interface SeenRequest {
  readonly method: string
  readonly path: string
  readonly authorization: string | undefined
}

export interface RegistryFront {
  readonly url: string
  readonly host: string
  readonly seen: SeenRequest[]
  /** Answers in place of the registry where it returns true. */
  intercept: (request: IncomingMessage, response: ServerResponse) => boolean
  /** Changes the body of an answer of the registry on its way. */
  rewrite: ((path: string, bytes: Buffer) => Buffer) | undefined
}

/** A proxy on a port of its own that hands everything to `registryUrl`. */
export async function startRegistryFront(t: TestContext, registryUrl: string): Promise<RegistryFront> {
  const seen: SeenRequest[] = []
  const { url, host } = await startHttp(t, (request, response) => {
    const { method = '', url: path = '' } = request
    seen.push({ method, path, authorization: request.headers.authorization })
    if (front.intercept(request, response)) return
    const headers = { ...request.headers }
    delete headers.authorization
    delete headers.host
    const passed = httpRequest(new URL(path, registryUrl), { method, headers }, (answer) => {
      const { rewrite } = front
      response.writeHead(answer.statusCode ?? 502, answer.headers)
      if (!rewrite || method === 'HEAD') {
        answer.pipe(response)
        return
      }
      void answer.toArray().then((parts) => {
        response.end(rewrite(path, Buffer.concat(parts as Buffer[])))
      })
    })
    passed.on('error', () => response.destroy())
    request.pipe(passed)
  })
  const front: RegistryFront = { url, host, seen, intercept: () => false, rewrite: undefined }
  return front
}

/** Distribution's token flow in front of a registry: who has the password gets tokens from a server of their own, on a port of its own. */
export async function wantTokens(
  t: TestContext,
  front: RegistryFront,
  { user, password, lifeSeconds = 60 }: { user: string; password: string; lifeSeconds?: number },
) {
  const good = new Set<string>()
  const asked: { scope: string | null; service: string | null; authorization: string | undefined }[] = []
  const tokens = await startHttp(t, (request, response) => {
    const { searchParams } = new URL(request.url ?? '', 'http://tokens')
    const { authorization } = request.headers
    asked.push({ scope: searchParams.get('scope'), service: searchParams.get('service'), authorization })
    if (authorization !== `Basic ${Buffer.from(`${user}:${password}`).toString('base64')}`) {
      response.writeHead(401).end()
      return
    }
    const token = `token-${good.size}`
    good.add(token)
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ token, expires_in: lifeSeconds }))
  })
  const before = front.intercept
  front.intercept = (request, response) => {
    const token = /^Bearer (.+)$/.exec(request.headers.authorization ?? '')?.[1]
    if (token !== undefined && good.has(token)) return before(request, response)
    const name = /^\/v2\/(.+)\/(?:manifests|blobs|tags)\//.exec(request.url ?? '')?.[1] ?? ''
    response.setHeader(
      'www-authenticate',
      `Bearer realm="${tokens.url}/token",service="registry.test",scope="repository:${name}:pull"`,
    )
    response.writeHead(401).end()
    return true
  }
  return { asked, good }
}

/** A server of HTTP on a port of loopback. */
export async function startHttp(
  t: TestContext,
  answer: RequestListener,
  host = '127.0.0.1',
): Promise<{ url: string; host: string }> {
  const server = createServer(answer)
  server.listen(0, host)
  await once(server, 'listening')
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  const { port } = server.address() as AddressInfo
  return { url: `http://${host}:${port}`, host: `${host}:${port}` }
}

import type { Server as HttpServer, IncomingMessage } from 'node:http'
import { createServer as createPlainServer } from 'node:http'
import { Server as HttpsServer, createServer as createTlsServer } from 'node:https'
import type { AddressInfo, Socket } from 'node:net'
import { Server as NetServer } from 'node:net'
import type { FastifyInstance, FastifyReply, FastifyRequest, RawServerDefault } from 'fastify'
import { fastify } from 'fastify'
import type { Ip } from '../lib/protocol/address.ts'
import { socketAddress } from '../lib/protocol/address.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import { monotonicMs } from '../lib/runtime/clock.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { ServerConfig } from './config.ts'
import { lingerOnClose } from './lingering-close.ts'
import { ApiError, passingFault } from './registry/api-error.ts'
import { clientAddress } from './tracker/client-address.ts'
import type { TlsMaterial } from './tracker/http-tls.ts'
import { quietTurn } from './tracker/quiet-turn.ts'

/**
 * The main port: bound, but answering 503 until `open` is called, since routes need to know the port that was chosen. One that another
 * process may listen on too is bound by `open`: until then that one answers. Disposed, it takes no more connections and waits for the
 * requests under way; once more does nothing.
 */
export interface MainPort extends AsyncDisposable {
  readonly app: FastifyInstance
  readonly address: { host: string; port: number }
  /** `http://127.0.0.1:6969`: what the address alone says; the default of `public_url`. */
  readonly origin: string
  /** The client's address: the socket's, or what trusted proxies say. */
  readonly sourceOf: (request: FastifyRequest) => Ip
  /** Call when all routes are registered. @throws Error when the address cannot be used */
  open(): Promise<void>
  /** From now on each reply is the last on its connection, so that clients go elsewhere; new connections are still taken. */
  leave(): void
  /** Trusts other proxies, sets other limits, and shows another certificate to new connections. @throws Error when it cannot be used; then nothing has changed */
  reload(config: ServerConfig['http'], tls: TlsMaterial | undefined): void
}

/** JSON bodies of our own APIs; streams of blobs do not pass here. */
const bodyMaxBytes = 1024 * 1024
/** A body that is slower than this over a whole `request_timeout` is cut: it holds a socket and a session for nothing. */
const bodyBytesPerSecondMin = 1024
/** How long requests under way may take to end at shutdown. */
const drainMs = 10_000
/** Within this the request comes on a connection that was the last to be taken. */
const freshMs = 500
/** Between two looks for connections that have become idle at the end. */
const sweepMs = 100

/**
 * Binds the main port.
 *
 * @throws ConfigError when the certificate cannot be used, Error when the address cannot
 */
export async function startMainPort(
  config: ServerConfig['http'],
  deps: { tls: TlsMaterial | undefined; log: Logger; reusePort?: boolean },
): Promise<MainPort> {
  const { host, port } = config.addr
  const { reusePort = false } = deps
  const server = createHttpServer(config, deps.tls)
  server.requestTimeout = 0
  limit(server, config)
  lingerOnClose(server)
  const handshakes = isTls(server) ? watchHandshakes(server) : undefined
  server.on('timeout', (socket: { destroy(): void }) => {
    socket.destroy()
  })
  let current = config
  let opened = false
  let leaving = false
  const app = fastify<RawServerDefault>({
    logger: false,
    bodyLimit: bodyMaxBytes,
    exposeHeadRoutes: false,
    routerOptions: { maxParamLength: 8192 },
    // A path that cannot be decoded reaches no route, and no handler of errors.
    frameworkErrors: (_error, request, reply) => {
      void (reply as FastifyReply)
        .code(400)
        .send(refusal(request.url, 'NAME_INVALID', 'Cannot read the path: a percent escape is broken'))
    },
    serverFactory: (handler) => {
      server.on('request', (request, response) => {
        if (leaving) response.setHeader('connection', 'close')
        if (opened) {
          handler(request, response)
        } else {
          response.writeHead(503, { 'retry-after': '1', connection: 'close' }).end()
        }
      })
      return server
    },
  })
  let closing: Promise<void> | undefined
  // A server that ends must not be kept by clients that go on asking on connections they have.
  app.addHook('onSend', (_request, reply, payload, done) => {
    if (leaving) void reply.header('connection', 'close')
    done(null, payload)
  })
  guardSlowBodies(app, () => current.request_timeout)
  answerErrors(app, deps.log)
  const listen = () =>
    new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen({ host, port, reusePort }, () => {
        server.off('error', reject)
        resolve()
      })
    })
  // The kernel would give this process connections that the other one could answer.
  const listensLate = reusePort && port !== 0
  if (!listensLate) await listen()
  const address = { host, port: listensLate ? port : (server.address() as AddressInfo).port }
  const close = async () => {
    leaving = true
    if (reusePort) await quietTurn()
    // That of node:http would at once end connections whose request is still on its way.
    const drained = new Promise((resolve) => NetServer.prototype.close.call(server, resolve))
    const idleFromMs = monotonicMs() + freshMs
    // Bytes of a blob may have been on their way, under a head that did not say that the connection ends with them.
    const sweep = setInterval(() => {
      if (monotonicMs() >= idleFromMs) server.closeIdleConnections()
    }, sweepMs)
    // To node:http they are no connections yet, and it would wait for them.
    handshakes?.destroy()
    const cut = setTimeout(() => {
      server.closeAllConnections()
    }, drainMs)
    await drained
    clearTimeout(cut)
    clearInterval(sweep)
    await app.close()
  }
  const shown = host.includes(':') ? `[${host}]` : host
  return {
    app,
    address,
    origin: `${deps.tls ? 'https' : 'http'}://${shown}:${address.port}`,
    sourceOf: (request) => sourceOf(request.raw, current),
    reload: (next, material) => {
      if (material && isTls(server)) server.setSecureContext(secureContextOf(material))
      limit(server, next)
      current = next
    },
    open: async () => {
      await app.ready()
      opened = true
      if (listensLate) await listen()
    },
    leave: () => {
      leaving = true
    },
    [Symbol.asyncDispose]: () => (closing ??= close()),
  }
}

/** For connections that come from now on. */
function limit(server: HttpServer | HttpsServer, config: ServerConfig['http']): void {
  server.headersTimeout = config.request_timeout
  server.keepAliveTimeout = config.idle_timeout
  server.timeout = config.idle_timeout
  server.maxConnections = config.connections_max
}

function createHttpServer(
  { request_timeout }: ServerConfig['http'],
  tls: TlsMaterial | undefined,
): HttpServer {
  // How often Node looks for heads that are late; its own 30 s would be most of their time.
  const connectionsCheckingInterval = Math.min(request_timeout, 1000)
  if (!tls) return createPlainServer({ connectionsCheckingInterval })
  const server = createTlsServer({ ...secureContextOf(tls), connectionsCheckingInterval })
  server.on('secureConnection', (socket) => {
    // Where a certificate is optional, a wrong one is still wrong.
    if (tls.clientCertificates !== undefined && !socket.authorized && socket.getPeerX509Certificate())
      socket.destroy()
  })
  return server
}

function isTls(server: HttpServer | HttpsServer): server is HttpsServer {
  return server instanceof HttpsServer
}

/** Connections whose TLS handshake is under way. */
function watchHandshakes(server: HttpsServer): { destroy(): void } {
  const underWay = new Map<string, Socket>()
  let closing = false
  // Tells connections apart; a TLS socket has the key of the socket that it was made of.
  const keyOf = ({ remoteAddress = '', remotePort = 0 }: Socket) => `${remoteAddress} ${remotePort}`
  server.on('connection', (socket: Socket) => {
    if (closing) {
      socket.destroy()
      return
    }
    const key = keyOf(socket)
    underWay.set(key, socket)
    socket.once('close', () => {
      if (underWay.get(key) === socket) underWay.delete(key)
    })
  })
  server.on('secureConnection', (socket) => {
    underWay.delete(keyOf(socket))
  })
  return {
    destroy: () => {
      closing = true
      for (const socket of underWay.values()) socket.destroy()
    },
  }
}

function secureContextOf({ cert, key, clientCa, clientCertificates }: TlsMaterial) {
  return {
    cert,
    key,
    minVersion: 'TLSv1.2' as const,
    requestCert: clientCertificates !== undefined,
    rejectUnauthorized: clientCertificates === 'required',
    ...(clientCa && { ca: clientCa }),
  }
}

function sourceOf(
  { socket, headers }: IncomingMessage,
  { trusted_proxies, real_ip_header }: ServerConfig['http'],
): Ip {
  const peer = socketAddress(socket.remoteAddress)
  // The socket was closed while the request waited; the answer goes nowhere.
  if (peer === undefined) throw new ClientError('gone', 'the connection is closed')
  if (trusted_proxies.length === 0) return peer
  const values = [headers[real_ip_header] ?? []].flat()
  return clientAddress(
    peer,
    values.length > 0 ? values.join(',') : undefined,
    real_ip_header,
    trusted_proxies,
  )
}

/** Node bounds the head of a request; this bounds the patience with its body. */
function guardSlowBodies(app: FastifyInstance, window: () => number): void {
  app.addHook('onRequest', (request, reply, done) => {
    const { raw } = request
    if (raw.headers['content-length'] !== undefined || raw.headers['transfer-encoding'] !== undefined) {
      const windowMs = window()
      let before = raw.socket.bytesRead
      const timer = setInterval(() => {
        const received = raw.socket.bytesRead - before
        before = raw.socket.bytesRead
        // Bytes that wait to be read here are our slowness, not the client's.
        if (raw.complete || raw.readableLength > 0 || received >= (bodyBytesPerSecondMin * windowMs) / 1000)
          return
        raw.socket.destroy()
      }, windowMs)
      const stop = () => {
        clearInterval(timer)
      }
      raw.once('end', stop)
      raw.once('close', stop)
      reply.raw.once('close', stop)
    }
    done()
  })
}

/** `{error: {code, message, hint}}`; what is not the caller's fault is logged and not told. */
function answerErrors(app: FastifyInstance, log: Logger): void {
  app.setErrorHandler((error: unknown, request, reply) => {
    const told = error instanceof ApiError ? error : passingFault(error)
    if (told) {
      return reply
        .code(told.status)
        .headers(told.headers)
        .send({ error: { code: told.code, message: told.message, hint: told.hint } })
    }
    if (error instanceof ClientError) {
      return reply.code(400).send({ error: { code: error.code, message: error.message } })
    }
    if (isFastifyRefusal(error)) {
      return reply
        .code(error.statusCode)
        .send({ error: { code: 'BAD_REQUEST', message: `Cannot read the request: ${error.message}` } })
    }
    log.error({ err: error, method: request.method, route: request.routeOptions.url }, 'request failed')
    return reply.code(500).send({
      error: { code: 'INTERNAL', message: 'internal error', hint: 'The log of the server says more.' },
    })
  })
  app.setNotFoundHandler((request, reply) =>
    reply
      .code(404)
      .send(
        refusal(
          request.url,
          request.url.startsWith('/v2/') ? 'UNSUPPORTED' : 'NOT_FOUND',
          `There is no ${request.method} ${request.url.split('?')[0]?.slice(0, 200) ?? ''} here`,
        ),
      ),
  )
}

/** The body of an error: the OCI distribution API has a form of its own. */
function refusal(url: string, code: string, message: string) {
  return url.startsWith('/v2/') ? { errors: [{ code, message }] } : { error: { code, message } }
}

function isFastifyRefusal(error: unknown): error is Error & { statusCode: number } {
  return (
    error instanceof Error &&
    'statusCode' in error &&
    typeof error.statusCode === 'number' &&
    error.statusCode < 500
  )
}

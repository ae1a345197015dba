import type { AddressInfo, Socket } from 'node:net'
import { createServer } from 'node:net'
import type { Ip } from '../../lib/protocol/address.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { ForwardedHeader } from './client-address.ts'
import { createArrivals } from './http-arrivals.ts'
import type { TrackerHandlers } from './http-connection.ts'
import { HttpConnection } from './http-connection.ts'
import type { TrackerRoutes } from './http-routes.ts'
import { compileRoutes } from './http-routes.ts'
import { Turns } from './http-turns.ts'
import type { TlsMaterial } from './http-tls.ts'
import { quietTurn } from './quiet-turn.ts'

/** What may change while the listener runs. */
export interface HttpListenerSettings {
  readonly routes: TrackerRoutes
  /** More connections than this are closed as they come. */
  readonly connectionsMax: number
  /** For a whole head; for a PROXY protocol header and a TLS handshake together. */
  readonly headTimeoutMs: number
  /** Between two requests, and for a client that does not read its replies. */
  readonly idleTimeoutMs: number
  /** Networks whose forwarded header, and whose PROXY protocol header, says who the client is. */
  readonly trustedProxies: readonly Cidr[]
  readonly forwardedHeader: ForwardedHeader
}

export interface HttpListenerOptions extends HttpListenerSettings {
  readonly host: string
  readonly port: number
  /** Other processes may listen on the port too; the kernel spreads connections over them. */
  readonly reusePort?: boolean
  readonly tls?: TlsMaterial | undefined
  /** Connections from trusted proxies must start with a PROXY protocol header; it comes before TLS. */
  readonly proxyProtocol?: boolean
  /** How long requests under way may take to end once the listener is disposed. */
  readonly drainTimeoutMs?: number
  readonly tracker: TrackerHandlers
  readonly log: Logger
}

/**
 * A port for announces and scrapes alone: HTTP/1.1 on bare sockets, several times as fast as node:http. Disposed, it takes no more
 * connections, closes the idle ones and waits for the requests under way; once more does nothing.
 */
export interface HttpListener extends AsyncDisposable {
  readonly address: { readonly host: string; readonly port: number }
  /** Those whose handshake is under way included. */
  readonly connections: number
  /** Connections beyond `connectionsMax`, closed as they came. Where file descriptors run out first, libuv closes them unseen. */
  readonly refused: number
  /**
   * For new connections; those that are there go on as they began.
   *
   * @throws Error when the material cannot be used, or the listener speaks no TLS; then nothing has changed
   */
  setTls(material: TlsMaterial): void
  /** From now on each reply is the last on its connection, so that clients go elsewhere; new connections are still taken. */
  leave(): void
  /** @throws Error naming a route that cannot be used; then nothing has changed */
  update(settings: Partial<HttpListenerSettings>): void
}

/** Between two looks for connections that are late: they are closed up to a quarter of their time late, or up to this. */
const sweepMsMax = 1_000
/** How long handshakes under way may take to end once the listener is disposed. */
const handshakesMs = 1_000
/** Without file descriptors the same line would be logged for every connection. */
const acceptLogMs = 10_000
/** Linux cuts it to net.core.somaxconn. node's own 511 overflows when thousands of clients come at once. */
const backlog = 4096

/** @throws Error when the address, a route or the TLS material cannot be used */
export async function startHttpListener(options: HttpListenerOptions): Promise<HttpListener> {
  const { host, log, proxyProtocol = false, drainTimeoutMs = 10_000 } = options
  const context = {
    ...contextOf(options),
    tracker: options.tracker,
    turns: new Turns(),
    log,
    now: () => performance.now(),
    closing: false,
    leaving: false,
  }
  const connections = new Set<HttpConnection>()
  const forget = (connection: HttpConnection) => {
    connections.delete(connection)
  }
  const serve = (socket: Socket, peer: Ip | undefined) => {
    const connection = new HttpConnection(context, socket, peer, forget)
    connections.add(connection)
    return connection
  }
  const arrivals = createArrivals({
    tls: options.tls,
    proxyProtocol,
    context,
    ready: (socket, peer, rest) => {
      const connection = serve(socket, peer)
      if (rest.length > 0) connection.received(rest)
      socket.resume()
    },
    log,
  })
  const bare = options.tls === undefined && !proxyProtocol
  let refused = 0

  const server = createServer({ allowHalfOpen: true })
  server.maxConnections = options.connectionsMax
  server.on('connection', (socket) => {
    if (bare) serve(socket, undefined)
    else arrivals.accept(socket)
  })
  server.on('drop', () => {
    refused++
  })
  await listen(server, options)
  let loggedAt = -Infinity
  server.on('error', (error) => {
    refused++
    if (performance.now() - loggedAt < acceptLogMs) return
    loggedAt = performance.now()
    log.warn({ err: error }, 'cannot take connections')
  })

  const sweep = () => {
    const nowMs = context.now()
    for (const connection of connections) connection.sweep(nowMs)
    arrivals.sweep(nowMs)
  }
  let sweeping = setInterval(sweep, sweepMs(context)).unref()

  const close = async () => {
    context.closing = true
    if (options.reusePort === true) await quietTurn()
    const closed = new Promise((resolve) => server.close(resolve))
    for (const connection of connections) connection.retire()
    const handshakes = setTimeout(() => {
      arrivals.destroy()
    }, handshakesMs)
    const cut = setTimeout(() => {
      arrivals.destroy()
      for (const connection of connections) connection.destroy()
    }, drainTimeoutMs)
    await closed
    clearTimeout(handshakes)
    clearTimeout(cut)
    clearInterval(sweeping)
  }
  let closing: Promise<void> | undefined
  return {
    address: { host, port: (server.address() as AddressInfo).port },
    get connections() {
      return connections.size + arrivals.count
    },
    get refused() {
      return refused
    },
    setTls: (material) => {
      arrivals.setTls(material)
    },
    leave: () => {
      context.leaving = true
    },
    update: (settings) => {
      const next = { ...options, ...settings }
      Object.assign(context, contextOf(next))
      options = next
      server.maxConnections = next.connectionsMax
      clearInterval(sweeping)
      sweeping = setInterval(sweep, sweepMs(context)).unref()
    },
    [Symbol.asyncDispose]: () => (closing ??= close()),
  }
}

/** The settings as connections use them. */
function contextOf({
  routes,
  headTimeoutMs,
  idleTimeoutMs,
  trustedProxies,
  forwardedHeader,
}: HttpListenerSettings) {
  return { match: compileRoutes(routes), headTimeoutMs, idleTimeoutMs, trustedProxies, forwardedHeader }
}

function sweepMs({ headTimeoutMs, idleTimeoutMs }: { headTimeoutMs: number; idleTimeoutMs: number }): number {
  return Math.max(10, Math.min(sweepMsMax, headTimeoutMs / 4, idleTimeoutMs / 4))
}

function listen(
  server: ReturnType<typeof createServer>,
  { host, port, reusePort = false }: HttpListenerOptions,
): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    server.listen({ host, port, reusePort, backlog }, () => {
      server.off('error', reject)
      resolve()
    })
  })
}

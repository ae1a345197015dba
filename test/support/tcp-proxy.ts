// One address in front of several servers, as an operator's load balancer is; or one link that a test can cut, stop or slow.
import { once } from 'node:events'
import type { AddressInfo, Socket } from 'node:net'
import { connect, createServer } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

export interface ProxyTarget {
  readonly port: number
  /** Where it says whether it wants new connections (200) or not; without it, by connecting alone. */
  readonly readyUrl?: string | undefined
}

/** A server behind the proxy, and what a test does to the way there. */
export interface ProxyLink {
  readonly port: number
  /** Connections through it now. */
  readonly connections: number
  /** Whether it gets new connections, by its own word. */
  readonly isReady: boolean
  /** Connections that ended while the client waited for an answer, or had sent more of a request than was answered. */
  readonly cutUnderWay: number
  /** Ends all connections and takes no new ones to there. */
  cut(): void
  /** Nothing comes through any more, either way, and nobody is told: as where packets are lost. */
  stall(): void
  /** Each part of what comes through is held for so long. */
  slow(delayMs: number): void
  /** As at the start. */
  mend(): void
}

export interface TcpProxy extends AsyncDisposable {
  readonly port: number
  readonly links: readonly ProxyLink[]
}

/** Between two looks at whether a server is ready. */
const lookMs = 200
const connectTimeoutMs = 1000

/**
 * Listens on loopback. Each connection goes to the next server in turn that is ready and takes it; where none is ready, to any that
 * takes it. It knows no HTTP: a connection stays with its server until one side ends it.
 */
export async function startTcpProxy(
  targets: readonly ProxyTarget[],
  { port = 0 }: { port?: number } = {},
): Promise<TcpProxy> {
  const links = targets.map((target) => new Link(target))
  const ending = new AbortController()
  const clients = new Set<Socket>()
  let turn = 0

  const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    clients.add(client)
    client.on('error', () => client.destroy())
    client.once('close', () => clients.delete(client))
    const inTurn = [...links.slice(turn), ...links.slice(0, turn)]
    turn = (turn + 1) % links.length
    const open = inTurn.filter((link) => !link.isCut)
    void carry(client, [...open.filter((link) => link.isReady), ...open.filter((link) => !link.isReady)])
  })
  server.listen(port, '127.0.0.1')
  await once(server, 'listening')
  const looking = links.map((link) => link.watch(ending.signal))
  return {
    port: (server.address() as AddressInfo).port,
    links,
    [Symbol.asyncDispose]: async () => {
      ending.abort()
      for (const client of clients) client.destroy()
      for (const link of links) link.cut()
      await Promise.all([new Promise((settle) => server.close(settle)), ...looking])
    },
  }
}

async function carry(client: Socket, inTurn: readonly Link[]): Promise<void> {
  for (const link of inTurn) {
    const upstream = await link.connect()
    if (!upstream) continue
    if (client.destroyed || link.isCut) {
      upstream.destroy()
      continue
    }
    link.join(client, upstream)
    return
  }
  client.destroy()
}

class Link implements ProxyLink {
  readonly #target: ProxyTarget
  readonly #sockets = new Set<Socket>()
  #stalled = false
  #delayMs = 0
  isCut = false
  isReady = true
  cutUnderWay = 0

  constructor(target: ProxyTarget) {
    this.#target = target
  }

  get port(): number {
    return this.#target.port
  }

  get connections(): number {
    return this.#sockets.size / 2
  }

  cut(): void {
    this.isCut = true
    for (const socket of this.#sockets) socket.destroy()
  }

  stall(): void {
    this.#stalled = true
    for (const socket of this.#sockets) socket.pause()
  }

  slow(delayMs: number): void {
    this.#delayMs = delayMs
  }

  mend(): void {
    this.isCut = false
    this.#stalled = false
    this.#delayMs = 0
    for (const socket of this.#sockets) socket.resume()
  }

  /** @returns undefined where nobody takes the connection */
  async connect(): Promise<Socket | undefined> {
    const socket = connect({ port: this.port, host: '127.0.0.1', allowHalfOpen: true, noDelay: true })
    socket.on('error', () => socket.destroy())
    try {
      await once(socket, 'connect', { signal: AbortSignal.timeout(connectTimeoutMs) })
      return socket
    } catch {
      socket.destroy()
      return undefined
    }
  }

  join(client: Socket, upstream: Socket): void {
    let waiting = false
    for (const [from, to] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      this.#sockets.add(from)
      from.on('data', (chunk: Buffer) => {
        waiting = from === client
        this.#later(() => {
          if (to.writable && !to.write(chunk)) {
            from.pause()
            to.once('drain', () => {
              if (!this.#stalled) from.resume()
            })
          }
        })
      })
      from.once('end', () => {
        this.#later(() => to.end())
      })
      from.once('close', () => {
        this.#sockets.delete(from)
        if (from === upstream && waiting) this.cutUnderWay++
        waiting = false
        this.#later(() => to.destroySoon())
      })
      if (this.#stalled) from.pause()
    }
  }

  async watch(signal: AbortSignal): Promise<void> {
    const { readyUrl } = this.#target
    if (readyUrl === undefined) return
    while (!signal.aborted) {
      this.isReady = await fetch(readyUrl, {
        signal: AbortSignal.any([signal, AbortSignal.timeout(2000)]),
      }).then(
        async (response) => {
          await response.arrayBuffer()
          return response.ok
        },
        () => false,
      )
      await sleep(lookMs, undefined, { signal }).catch(() => undefined)
    }
  }

  #later(act: () => void): void {
    if (this.#delayMs > 0) setTimeout(act, this.#delayMs)
    else act()
  }
}

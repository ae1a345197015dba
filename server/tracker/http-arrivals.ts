import type { Socket } from 'node:net'
import type { TLSSocket } from 'node:tls'
import type { Ip } from '../../lib/protocol/address.ts'
import { socketAddress } from '../../lib/protocol/address.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import { isTrusted } from './client-address.ts'
import type { ConnectionContext } from './http-connection.ts'
import type { TlsMaterial } from './http-tls.ts'
import { createTlsHandshaker } from './http-tls.ts'
import { readProxyHeader } from './proxy-protocol.ts'

/** Connections that are not HTTP yet: their PROXY protocol header or their TLS handshake is under way. */
export interface Arrivals {
  readonly count: number
  /** Takes a socket that was just accepted. */
  accept(socket: Socket): void
  /** Closes those that took too long. */
  sweep(nowMs: number): void
  destroy(): void
  /** @throws Error when the material cannot be used, or there is no TLS; then nothing has changed */
  setTls(material: TlsMaterial): void
}

export interface ArrivalsOptions {
  readonly tls: TlsMaterial | undefined
  /** Whether trusted proxies start with a PROXY protocol header; it comes before TLS. */
  readonly proxyProtocol: boolean
  readonly context: Pick<ConnectionContext, 'trustedProxies' | 'headTimeoutMs' | 'now'>
  /** Called once HTTP begins. `peer` is who the PROXY protocol names, `rest` what came behind its header. */
  readonly ready: (socket: Socket, peer: Ip | undefined, rest: Buffer) => void
  readonly log: Logger
}

interface Arrival {
  readonly socket: Socket
  readonly deadline: number
  peer: Ip | undefined
}

const nothing = Buffer.alloc(0)

/** @throws Error when the TLS material cannot be used */
export function createArrivals(options: ArrivalsOptions): Arrivals {
  const { proxyProtocol, context, ready, log } = options
  const arrivals = new Map<string, Arrival>()
  const secured = (socket: TLSSocket) => {
    const key = socketKey(socket)
    const arrival = arrivals.get(key)
    arrivals.delete(key)
    if (arrival === undefined) socket.destroy()
    else ready(socket, arrival.peer, nothing)
  }
  let handshaker = options.tls && createTlsHandshaker(options.tls, secured)

  const enter = (key: string, { socket, peer }: Arrival, rest: Buffer) => {
    if (handshaker === undefined) {
      arrivals.delete(key)
      ready(socket, peer, rest)
    } else {
      if (rest.length > 0) socket.unshift(rest)
      handshaker.emit('connection', socket)
    }
  }
  return {
    get count() {
      return arrivals.size
    },
    accept: (socket) => {
      const address = socketAddress(socket.remoteAddress)
      if (address === undefined) {
        socket.destroy()
        return
      }
      const key = socketKey(socket)
      const arrival: Arrival = { socket, deadline: context.now() + context.headTimeoutMs, peer: undefined }
      arrivals.set(key, arrival)
      // A TLS handshake is several writes.
      socket.setNoDelay()
      socket.on('error', ignore)
      socket.once('close', () => {
        if (arrivals.get(key) === arrival) arrivals.delete(key)
      })
      if (!proxyProtocol || !isTrusted(address, context.trustedProxies)) {
        enter(key, arrival, nothing)
        return
      }
      readNamed(socket, (named) => {
        if (named.kind === 'broken') {
          log.debug({ reason: named.message }, 'connection refused')
          socket.destroy()
          return
        }
        arrival.peer = named.source
        enter(key, arrival, named.rest)
      })
    },
    sweep: (nowMs) => {
      for (const { socket, deadline } of arrivals.values()) if (deadline <= nowMs) socket.destroy()
    },
    destroy: () => {
      for (const { socket } of arrivals.values()) socket.destroy()
    },
    setTls: (material) => {
      if (handshaker === undefined) throw new Error('Cannot set certificates: this listener speaks no TLS')
      handshaker = createTlsHandshaker(material, secured)
    },
  }
}

/** Tells the connections of a listener apart; a TLS socket has the key of the socket that it was made of. */
function socketKey({ remoteAddress = '', remotePort = 0, localAddress = '' }: Socket): string {
  return `${remoteAddress} ${remotePort} ${localAddress}`
}

type Named =
  | { readonly kind: 'named'; readonly source: Ip | undefined; readonly rest: Buffer }
  | { readonly kind: 'broken'; readonly message: string }

/** Reads the PROXY protocol header and leaves the socket paused. */
function readNamed(socket: Socket, done: (named: Named) => void): void {
  let bytes = nothing as Buffer
  const finish = (named: Named) => {
    socket.off('data', read).off('end', ended).pause()
    done(named)
  }
  const read = (chunk: Buffer) => {
    bytes = bytes.length === 0 ? chunk : Buffer.concat([bytes, chunk])
    const header = readProxyHeader(bytes)
    if (header.kind === 'broken') finish(header)
    if (header.kind === 'header')
      finish({ kind: 'named', source: header.source, rest: bytes.subarray(header.length) })
  }
  const ended = () => {
    finish({ kind: 'broken', message: 'the connection ended within its PROXY protocol header' })
  }
  socket.on('data', read).on('end', ended)
}

function ignore(): void {
  // 'close' follows.
}

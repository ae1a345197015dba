import type { Socket } from 'node:net'
import { connect } from 'node:net'
import { connect as connectTls, createSecureContext, TLSSocket } from 'node:tls'
import type { Endpoint, Ip } from '../../lib/protocol/address.ts'
import { endpointIp, endpointPort, formatIp, socketAddress } from '../../lib/protocol/address.ts'
import { thumbprintOf } from '../../lib/protocol/thumbprint.ts'
import type { EngineConfig } from './engine.ts'
import type { Handshake } from './wire.ts'
import { handshakeBytes, isHandshakeStart, readHandshake } from './wire.ts'

/** A host of the datacentre answers within a millisecond; one that has not after a second is not there. */
const dialTimeoutMs = 1_000
const handshakeTimeoutMs = 5_000

/**
 * All connections that we dialled read into the same memory, since what comes is looked at before the next read. Large reads are few
 * system calls; more than this would no longer stay in the cache of a core.
 */
export const readBuffer = Buffer.allocUnsafeSlow(256 * 1024)

/** A connection before it is known which torrent it is for. What comes goes to `receive`, which may change. */
export interface Link {
  readonly socket: Socket
  readonly incoming: boolean
  readonly ip: Ip
  /** For an incoming connection the port means nothing. */
  readonly port: number
  /** SHA-256 of the certificate whose key the other side holds, base64url; undefined without TLS. */
  readonly thumbprint: string | undefined
  /** The bytes are valid during the call only. */
  receive: (bytes: Uint8Array) => void
  /** Where the next bytes are to be read to; incoming connections do not ask. The memory is written to until the next `receive`, or the end. */
  buffer: () => Uint8Array
}

/** How connections are made and taken. */
export interface Transport {
  /** Resolves once it is connected. @throws Error where it could not be within a second */
  dial(endpoint: Endpoint): Promise<Link>
  /** @throws Error where it is closed, or is none that is taken */
  accept(socket: Socket): Promise<Link>
}

/** The ciphers of TLS 1.3, the fastest on a host with AES instructions first. */
const ciphers = 'TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384'
/** The first byte of TLS: a record of a handshake. That of BitTorrent is 19. */
const tlsRecord = 0x16

/** TCP from and to `address`, and TLS over it as `tls` says: where it is not required, others choose by how they begin. */
export function createTransport({ address, tls }: Pick<EngineConfig, 'address' | 'tls'>): Transport {
  // Whom a certificate belongs to is said by the token that names it: no authority is asked.
  const secure = tls && {
    secureContext: createSecureContext({
      key: tls.key,
      cert: tls.certificate,
      minVersion: 'TLSv1.3',
      ciphers,
    }),
    rejectUnauthorized: false,
  }
  const takeSecure = async (socket: Socket): Promise<Link> => {
    const wrapped = new TLSSocket(socket, { ...secure, isServer: true, requestCert: true })
    wrapped.on('error', () => undefined)
    try {
      await connected(wrapped, 'secure', handshakeTimeoutMs)
      const link = taken(wrapped)
      // Tokens count over TLS by the certificate that they name: without one, any would do.
      if (link.thumbprint === undefined) throw new Error('it shows no certificate')
      return link
    } catch (error) {
      wrapped.destroy()
      throw error
    }
  }

  return {
    dial: async (endpoint) => {
      const ip = endpointIp(endpoint)
      const port = endpointPort(endpoint)
      const heard: Pick<Link, 'receive' | 'buffer'> = { receive: () => undefined, buffer: () => readBuffer }
      const options = {
        host: formatIp(ip),
        port,
        ...(address === undefined ? {} : { localAddress: address }),
        noDelay: true,
        keepAlive: true,
        keepAliveInitialDelay: 10_000,
        onread: {
          buffer: () => heard.buffer(),
          callback: (bytes: number, buffer: Uint8Array) => {
            heard.receive(buffer.subarray(0, bytes))
            return true
          },
        },
      }
      const socket = tls?.required === true ? connectTls({ ...options, ...secure }) : connect(options)
      await connected(socket, socket instanceof TLSSocket ? 'secureConnect' : 'connect', dialTimeoutMs)
      return Object.assign(heard, {
        socket,
        incoming: false,
        ip,
        port,
        thumbprint: thumbprintOfPeer(socket),
      })
    },
    accept: async (socket) => {
      socket.setNoDelay(true)
      socket.setKeepAlive(true, 10_000)
      socket.on('error', () => undefined)
      if (tls === undefined) return taken(socket)
      const first = await firstBytes(socket)
      socket.unshift(first)
      if (first[0] === tlsRecord) return takeSecure(socket)
      if (!tls.required) return taken(socket)
      socket.destroy()
      throw new Error('it does not speak TLS')
    },
  }
}

/** @throws Error where the event does not come in time */
async function connected(socket: Socket, event: string, timeoutMs: number): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<undefined>()
  const timer = setTimeout(() => {
    socket.destroy(new Error('it did not answer'))
  }, timeoutMs)
  socket.once(event, resolve)
  socket.on('error', reject)
  socket.once('close', () => {
    reject(new Error('it closed'))
  })
  try {
    await promise
  } finally {
    clearTimeout(timer)
  }
}

/** What a connection begins with. @throws Error where it closes, or says nothing in time */
async function firstBytes(socket: Socket): Promise<Buffer> {
  const { promise, resolve, reject } = Promise.withResolvers<Buffer>()
  const timer = setTimeout(() => {
    socket.destroy()
  }, handshakeTimeoutMs)
  const closed = () => {
    reject(new Error('it closed'))
  }
  socket.once('close', closed)
  socket.once('data', (chunk: Buffer) => {
    // What comes next is for whoever takes it.
    socket.pause()
    resolve(chunk)
  })
  try {
    return await promise
  } finally {
    clearTimeout(timer)
    socket.off('close', closed)
  }
}

function taken(socket: Socket): Link {
  const ip = socketAddress(socket.remoteAddress)
  const port = socket.remotePort
  if (ip === undefined || port === undefined) {
    socket.destroy()
    throw new Error('it closed')
  }
  const link: Link = {
    socket,
    incoming: true,
    ip,
    port,
    thumbprint: thumbprintOfPeer(socket),
    receive: () => undefined,
    buffer: () => readBuffer,
  }
  socket.on('data', (chunk: Buffer) => {
    link.receive(chunk)
  })
  // It may have been paused when its first bytes were looked at.
  socket.resume()
  return link
}

function thumbprintOfPeer(socket: Socket): string | undefined {
  const certificate = socket instanceof TLSSocket ? socket.getPeerX509Certificate() : undefined
  return certificate && thumbprintOf(certificate.raw)
}

/** The handshake of the other side, and what has come behind it until now. */
export interface Shaken {
  readonly handshake: Handshake
  readonly rest: Uint8Array
}

/** @throws Error where there is no handshake in time */
export function awaitHandshake(link: Link): Promise<Shaken> {
  const { promise, resolve, reject } = Promise.withResolvers<Shaken>()
  let held: Buffer = Buffer.alloc(0)
  const timer = setTimeout(() => {
    fail(new Error('no handshake'))
  }, handshakeTimeoutMs)
  const end = () => {
    clearTimeout(timer)
    link.socket.off('close', closed)
  }
  const fail = (error: Error) => {
    end()
    link.receive = () => undefined
    link.socket.destroy()
    reject(error)
  }
  const closed = () => {
    fail(new Error('it closed'))
  }
  link.socket.once('close', closed)
  link.receive = (bytes) => {
    held = Buffer.concat([held, bytes])
    if (!isHandshakeStart(held.subarray(0, 20))) {
      fail(new Error('not a handshake'))
      return
    }
    if (held.length < handshakeBytes) return
    end()
    // What comes before the reader is there is kept for it.
    let rest: Uint8Array = held.subarray(handshakeBytes)
    link.receive = (more) => {
      rest = Buffer.concat([rest, more])
    }
    resolve({
      handshake: readHandshake(held.subarray(0, handshakeBytes)),
      get rest() {
        return rest
      },
    })
  }
  return promise
}

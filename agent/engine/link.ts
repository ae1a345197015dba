import type { Socket } from 'node:net'
import { connect } from 'node:net'
import type { Endpoint, Ip } from '../../lib/protocol/address.ts'
import { endpointIp, endpointPort, formatIp, socketAddress } from '../../lib/protocol/address.ts'
import type { Handshake } from './wire.ts'
import { handshakeBytes, isHandshakeStart, readHandshake } from './wire.ts'

/** A host of the datacentre answers within a millisecond; one that has not after a second is not there. */
const dialTimeoutMs = 1_000
const handshakeTimeoutMs = 5_000

/**
 * All connections that we dialled read into the same memory, since what comes is looked at before the next read. Large reads are few
 * system calls; more than this would no longer stay in the cache of a core.
 */
const readBuffer = Buffer.allocUnsafeSlow(256 * 1024)

/** A TCP connection before it is known which torrent it is for. What comes goes to `receive`, which may change. */
export interface Link {
  readonly socket: Socket
  readonly incoming: boolean
  readonly ip: Ip
  /** For an incoming connection the port means nothing. */
  readonly port: number
  /** The bytes are valid during the call only. */
  receive: (bytes: Uint8Array) => void
}

/** Resolves once it is connected. @throws Error where it could not be within a second */
export function dial(endpoint: Endpoint, from: string | undefined): Promise<Link> {
  const { promise, resolve, reject } = Promise.withResolvers<Link>()
  const ip = endpointIp(endpoint)
  const socket = connect({
    host: formatIp(ip),
    port: endpointPort(endpoint),
    ...(from === undefined ? {} : { localAddress: from }),
    noDelay: true,
    keepAlive: true,
    keepAliveInitialDelay: 10_000,
    onread: {
      buffer: readBuffer,
      callback: (bytes, buffer) => {
        link.receive(buffer.subarray(0, bytes))
        return true
      },
    },
  })
  const link: Link = { socket, incoming: false, ip, port: endpointPort(endpoint), receive: () => undefined }
  const timer = setTimeout(() => {
    socket.destroy(new Error('it did not answer'))
  }, dialTimeoutMs)
  socket.once('connect', () => {
    clearTimeout(timer)
    resolve(link)
  })
  socket.once('close', () => {
    clearTimeout(timer)
    reject(new Error('it closed'))
  })
  socket.on('error', (error) => {
    reject(error)
  })
  return promise
}

/** Undefined where the socket has been closed meanwhile. */
export function accept(socket: Socket): Link | undefined {
  const ip = socketAddress(socket.remoteAddress)
  const port = socket.remotePort
  if (ip === undefined || port === undefined) return undefined
  const link: Link = { socket, incoming: true, ip, port, receive: () => undefined }
  socket.setNoDelay(true)
  socket.setKeepAlive(true, 10_000)
  socket.on('error', () => undefined)
  socket.on('data', (chunk: Buffer) => {
    link.receive(chunk)
  })
  return link
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

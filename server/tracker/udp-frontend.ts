import type { RemoteInfo, Socket } from 'node:dgram'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import type { Ip } from '../../lib/protocol/address.ts'
import { parseIp } from '../../lib/protocol/address.ts'
import {
  readUdpAction,
  readUdpTransactionId,
  udpActions,
  udpReplyMax,
  writeUdpConnectReply,
  writeUdpError,
} from '../../lib/protocol/udp.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { ConnectionIds } from './connection-id.ts'
import type { Tracker } from './tracker.ts'

/** Why a packet got no reply, or only an error: a closed set, for a metric. */
export type UdpDrop =
  'no_request' | 'bad_connection_id' | 'unknown_action' | 'send_queue_full' | 'send_failed'

export interface UdpObserver {
  connected(): void
  dropped(reason: UdpDrop): void
}

export interface UdpFrontendOptions {
  readonly address: { readonly host: string; readonly port: number }
  /** An IPv6 socket takes IPv4 packets, too, unless another one does. */
  readonly ipv6Only: boolean
  /** Several threads listen on the port, and the kernel gives each sender one of them. */
  readonly reusePort: boolean
  readonly tracker: Tracker
  readonly connectionIds: ConnectionIds
  /** Milliseconds since 1970: connection ids are shared with other servers. */
  readonly now: () => number
  readonly observer: UdpObserver
  readonly log: Logger
}

export interface UdpFrontend extends AsyncDisposable {
  readonly address: { readonly host: string; readonly port: number }
}

/** How long replies that wait for the store may take once the frontend is disposed. */
const drainMs = 1_000
/** Replies that the kernel would not take yet; beyond it they are dropped, and clients ask again. */
const sendQueueMax = 1024
const sendsPerLook = 16
/** Room in the kernel for packets that wait: some 20,000, as much as arrive in 0.2 s at full speed. The kernel may give less. */
const receiveBufferBytes = 8 * 1024 * 1024
/** Addresses whose bytes are remembered; when there are more, all are forgotten. */
const addressesMax = 16_384

/**
 * The UDP tracker (BEP 15, BEP 41). Whoever has not proved by a connection id that it receives what is sent to its address never gets
 * more bytes than it sent, so the tracker is of no use to those who forge addresses.
 *
 * @throws Error (EADDRINUSE and the like) when it cannot listen
 */
export async function startUdpFrontend(options: UdpFrontendOptions): Promise<UdpFrontend> {
  const { address, tracker, connectionIds, now, observer, log } = options
  const ipv6 = address.host.includes(':')
  const socket: Socket = createSocket({
    type: ipv6 ? 'udp6' : 'udp4',
    ipv6Only: ipv6 && options.ipv6Only,
    reusePort: options.reusePort,
    // Replies go to addresses, never to names.
    lookup: (host, _family, callback) => {
      callback(null, host, ipv6 ? 6 : 4)
    },
  })
  const addresses = new Map<string, Ip>()

  const sourceOf = ({ address: text }: RemoteInfo): Ip | undefined => {
    const known = addresses.get(text)
    if (known) return known
    const ip = parseIp(text.includes('%') ? text.slice(0, text.indexOf('%')) : text)
    if (ip === undefined) return undefined
    if (addresses.size >= addressesMax) addresses.clear()
    addresses.set(text, ip)
    return ip
  }

  let sends = 0
  let queued = 0
  const send = (reply: Buffer, to: RemoteInfo) => {
    // Asking costs a tenth of an announce; the queue cannot grow by more than this between two looks.
    if ((sends++ & (sendsPerLook - 1)) === 0 || queued > 0) queued = socket.getSendQueueCount()
    if (queued > sendQueueMax) observer.dropped('send_queue_full')
    else socket.send(reply, to.port, to.address)
  }

  // The kernel takes nearly every reply at once: then its buffer is free again, and still in the cache.
  const ring = Array.from({ length: sendsPerLook * 2 }, () => Buffer.alloc(udpReplyMax[4]))
  const views = [...ring]
  let turn = 0
  let atOnce = false
  const allocate = (bytes: number): Buffer => {
    // A reply that waits, for the kernel or for a promise, keeps a buffer of its own.
    if (!atOnce || queued > 0) return Buffer.allocUnsafe(bytes)
    turn = (turn + 1) & (ring.length - 1)
    const view = views[turn]
    if (view?.length === bytes) return view
    const fresh = (ring[turn] ?? Buffer.allocUnsafe(bytes)).subarray(0, bytes)
    views[turn] = fresh
    return fresh
  }

  const refuse = (packet: Buffer, to: RemoteInfo, message: string, bytesMax: number) => {
    const target = Buffer.allocUnsafe(bytesMax)
    send(target.subarray(0, writeUdpError(target, 0, readUdpTransactionId(packet), message, bytesMax)), to)
  }

  const received = (packet: Buffer, from: RemoteInfo) => {
    const action = readUdpAction(packet)
    const source = action === undefined || from.port === 0 ? undefined : sourceOf(from)
    if (source === undefined) {
      observer.dropped('no_request')
      return
    }
    if (action === udpActions.connect) {
      observer.connected()
      connectionIds.write(connectionId, 0, source, now())
      const reply = Buffer.allocUnsafe(16)
      writeUdpConnectReply(reply, 0, readUdpTransactionId(packet), connectionId)
      send(reply, from)
      return
    }
    const bytesMax = udpReplyMax[source.family]
    if (!connectionIds.isValid(packet, 0, source, now())) {
      observer.dropped('bad_connection_id')
      refuse(packet, from, 'bad connection ID', Math.min(packet.length, bytesMax))
      return
    }
    if (action === udpActions.error || (action ?? 0) > udpActions.oldIpv6Announce) {
      observer.dropped('unknown_action')
      refuse(packet, from, 'unknown action ID', bytesMax)
      return
    }
    atOnce = true
    const reply = tracker.packet(
      packet,
      action === udpActions.scrape ? 'scrape' : 'announce',
      source,
      allocate,
    )
    atOnce = false
    if (reply instanceof Promise) {
      underWay++
      void reply.then((late) => {
        if (open) send(late, from)
        if (--underWay === 0) answered()
      })
    } else {
      send(reply, from)
    }
  }

  const connectionId = Buffer.alloc(8)
  let open = true
  let underWay = 0
  let answered: () => void = () => undefined
  socket.on('message', received)
  // With a lookup that answers at once, it may be bound before bind() returns.
  const listening = once(socket, 'listening')
  socket.bind({ address: address.host, port: address.port, exclusive: true })
  await listening
  // A reply that cannot be sent (no route, a firewall) is the receiver's loss; the socket lives on.
  socket.on('error', (error) => {
    observer.dropped('send_failed')
    log.debug({ err: error }, 'UDP reply could not be sent')
  })
  try {
    socket.setRecvBufferSize(receiveBufferBytes)
  } catch (error) {
    log.debug({ err: error }, 'UDP receive buffer keeps its size')
  }
  return {
    address: { host: address.host, port: socket.address().port },
    [Symbol.asyncDispose]: async () => {
      if (underWay > 0) {
        const late = Promise.withResolvers<undefined>()
        answered = () => {
          late.resolve(undefined)
        }
        const cut = setTimeout(answered, drainMs)
        await late.promise
        clearTimeout(cut)
      }
      open = false
      await new Promise<void>((resolve) => {
        socket.close(resolve)
      })
    },
  }
}

import { randomBytes } from 'node:crypto'
import type { AddressInfo, Socket } from 'node:net'
import { createServer } from 'node:net'
import type { Dispatcher } from 'undici'
import { Agent } from 'undici'
import type { Engine, EngineConfig, EnginePeer, FetchOptions, SeedOptions } from './engine.ts'
import { Limiter } from './limiter.ts'
import { awaitHandshake, createTransport } from './link.ts'
import { createPieceStore } from './piece-store.ts'
import { ReadCache } from './read-cache.ts'
import { tickMs, Torrent } from './torrent.ts'
import { writeHandshake } from './wire.ts'

export interface RackswarmEngineDeps {
  /** Milliseconds since some start; it never goes back. */
  readonly monotonic: () => number
  readonly random: () => number
  /** Speaks HTTP to the webseed. */
  readonly dispatcher?: Dispatcher
}

/** Open sockets of all torrents together. */
const socketsMax = 2000
/** Strangers whose handshake has not come yet. */
const shakingMax = 200

/** Our own engine: made for hosts of one datacentre that want the same bytes, at the rate of their network. */
export async function createRackswarmEngine(
  config: EngineConfig,
  deps: RackswarmEngineDeps,
): Promise<Engine> {
  const peerId = Buffer.concat([Buffer.from('-RS0200-'), randomBytes(12)])
  const torrents = new Map<string, Torrent>()
  const limiter = new Limiter(config.limits, deps.monotonic)
  const store = createPieceStore()
  const cache = new ReadCache(deps.monotonic)
  const dispatcher = deps.dispatcher ?? new Agent({ connections: 4 })
  const transport = createTransport(config)
  const sockets = new Set<Socket>()
  let shaking = 0

  const keep = (socket: Socket) => {
    sockets.add(socket)
    socket.once('close', () => {
      sockets.delete(socket)
    })
  }

  const answer = async (socket: Socket): Promise<void> => {
    shaking++
    try {
      const link = await transport.accept(socket)
      const shaken = await awaitHandshake(link)
      const torrent = torrents.get(Buffer.from(shaken.handshake.infoHash).toString('hex'))
      if (torrent === undefined) {
        socket.destroy()
        return
      }
      link.socket.write(writeHandshake(shaken.handshake.infoHash, peerId))
      torrent.add(link, shaken, undefined)
    } catch {
      socket.destroy()
    } finally {
      shaking--
    }
  }

  const server = createServer((socket) => {
    keep(socket)
    if (shaking >= shakingMax) socket.destroy()
    else void answer(socket)
  })
  server.maxConnections = socketsMax
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(
      { port: config.port, ...(config.address === undefined ? {} : { host: config.address }) },
      () => {
        server.off('error', reject)
        resolve()
      },
    )
  })
  // Without file descriptors connections are lost, and nothing else.
  server.on('error', () => undefined)
  const { port } = server.address() as AddressInfo

  const connect = async ({ endpoint }: EnginePeer, infoHash: Uint8Array) => {
    if (sockets.size >= socketsMax) throw new Error('too many connections')
    const link = await transport.dial(endpoint)
    keep(link.socket)
    link.socket.write(writeHandshake(infoHash, peerId))
    const shaken = await awaitHandshake(link)
    if (!Buffer.from(shaken.handshake.infoHash).equals(infoHash)) {
      link.socket.destroy()
      throw new Error('it has another torrent')
    }
    return { link, shaken }
  }

  const ticker = setInterval(() => {
    for (const torrent of torrents.values()) torrent.tick()
    cache.sweep()
  }, tickMs)
  ticker.unref()

  const add = (options: FetchOptions | SeedOptions, kind: 'fetch' | 'seed'): Torrent => {
    const key = options.metainfo.infoHash
    if (torrents.has(key)) throw new Error(`Cannot add torrent ${key}: it is there already`)
    options.signal.throwIfAborted()
    const torrent = new Torrent(options, kind, {
      ...deps,
      config,
      limiter,
      store,
      cache,
      dispatcher,
      peerId,
      port,
      connect,
      closed: () => {
        torrents.delete(key)
      },
    })
    torrents.set(key, torrent)
    return torrent
  }
  return {
    name: 'rackswarm',
    port,
    peerId,
    fetch: (options) => add(options, 'fetch'),
    seed: (options) => add(options, 'seed'),
    setLimits: (limits) => {
      limiter.set(limits)
    },
    [Symbol.asyncDispose]: async () => {
      clearInterval(ticker)
      await Promise.all([...torrents.values()].map((torrent) => torrent.close()))
      for (const socket of sockets) socket.destroy()
      await new Promise<void>((resolve) => server.close(() => resolve()))
      await store[Symbol.asyncDispose]()
      if (deps.dispatcher === undefined) await dispatcher.destroy()
    },
  }
}

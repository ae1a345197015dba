// A tracker as operators run it: a process of its own with a configuration file; and clients that say exactly what they are told to.
import { spawn } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import type { OutgoingHttpHeaders } from 'node:http'
import { get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after } from 'node:test'
import type { Bencoded } from '../../lib/protocol/bencode.ts'
import { decode } from '../../lib/protocol/bencode.ts'
import { infoHashFromHex, infoHashToBytes } from '../../lib/protocol/infohash.ts'
import { escapeBytes } from '../../lib/protocol/query.ts'
import type { UdpAnnounceFields } from '../../lib/protocol/udp.ts'
import { parseUdpConnectReply, readUdpReplyTransactionId, writeUdpConnect } from '../../lib/protocol/udp.ts'
import type { Child } from '../../lib/runtime/child.ts'
import { startChild } from '../../lib/runtime/child.ts'
import { bin } from './fleet.ts'

/** Whoever undoes what a helper has started: a test, or the file with its `after`. */
export interface Owner {
  after(undo: () => PromiseLike<void> | void): void
}

/** For what all tests of a file share. */
export function fileOwner(): Owner {
  const owned = new AsyncDisposableStack()
  after(() => owned.disposeAsync())
  return {
    after: (undo) => {
      owned.defer(async () => undo())
    },
  }
}

export interface Address {
  readonly host: string
  readonly port: number
}

export interface TrackerProcess extends Child {
  /** Where its configuration lies; its data is in `data` there. */
  readonly directory: string
  readonly publicUrl: string
  readonly main: Address
  /** The main port of a server that is a tracker alone, then those of `tracker_addr`, then those of `tls_addr`. */
  readonly http: readonly Address[]
  readonly udp: readonly Address[]
  readonly stats: () => Promise<TrackerStats>
  readonly metrics: () => Promise<string>
  readonly log: () => Promise<string>
  /** The most memory it has ever had resident. */
  readonly peakBytes: () => Promise<number>
}

/** What `/stats.json` says, as far as tests ask. */
export interface TrackerStats {
  readonly swarms: number
  readonly seeders: number
  readonly leechers: number
  readonly refused: Readonly<Record<string, number>>
  readonly tokensRefused: Readonly<Record<string, number>>
  readonly udp: { readonly connects: number; readonly dropped: Readonly<Record<string, number>> }
}

/**
 * Starts a server with `roles: [tracker]`, or the roles that are given, on this configuration; `http` and `udp` sections that it does
 * not have listen on free ports of loopback.
 */
export async function startTracker(
  t: Owner,
  yaml: string,
  options: { directory?: string; roles?: string; metricsPort?: number } = {},
): Promise<TrackerProcess> {
  const directory = options.directory ?? (await temporaryDirectory(t))
  const config = await writeConfig(directory, yaml, options.roles, options.metricsPort)
  const logFile = join(directory, 'server.log')
  const child = await startChild({
    file: bin('rackswarm-server'),
    args: ['--config', config],
    readyMessage: 'server is listening',
    logFile,
  })
  t.after(() => child[Symbol.asyncDispose]())
  const { publicUrl, http, tracker, udp, metricsUrl } = child.ready
  const health = async (path: string) => fetch(`${String(metricsUrl)}${path}`)
  return {
    ...child,
    directory,
    publicUrl: String(publicUrl),
    main: http as Address,
    http: tracker as readonly Address[],
    udp: udp as readonly Address[],
    stats: async () => (await (await health('/stats.json')).json()) as TrackerStats,
    metrics: async () => (await health('/metrics')).text(),
    log: () => readFile(logFile, 'utf8'),
    peakBytes: async () => {
      const status = await readFile(`/proc/${child.pid}/status`, 'utf8')
      return Number(/^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1]) * 1024
    },
  }
}

/** Has the server only read a configuration. @returns its exit code and what it says of the faults */
export async function checkConfig(t: Owner, yaml: string): Promise<{ code: number; stderr: string }> {
  const config = await writeConfig(await temporaryDirectory(t), yaml)
  const child = spawn(process.execPath, [bin('rackswarm-server'), '--config', config, '--check'], {
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  let stderr = ''
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  const [code] = (await once(child, 'close')) as [number]
  return { code, stderr }
}

/** Lines that come before the given ones, so that faults are to be found at their line + `configHead`. */
export const configHead = 3

async function writeConfig(
  directory: string,
  yaml: string,
  roles = '[tracker]',
  metricsPort = 0,
): Promise<string> {
  const file = join(directory, 'server.yaml')
  const sections = [
    `roles: ${roles}\ndata_dir: ${join(directory, 'data')}\nmetrics_addr: 127.0.0.1:${metricsPort}\n`,
    yaml.endsWith('\n') || yaml === '' ? yaml : `${yaml}\n`,
    /^http:/m.test(yaml) ? '' : 'http: { addr: 127.0.0.1:0 }\n',
    /^udp:/m.test(yaml) ? '' : 'udp: { addr: 127.0.0.1:0 }\n',
  ]
  await writeFile(file, sections.join(''))
  return file
}

export async function temporaryDirectory(t: Owner): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-tracker-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

/** The first address of a list that must have one. */
export function first<Item>(list: readonly Item[]): Item {
  const [item] = list
  if (item === undefined) throw new Error('The list is empty')
  return item
}

export const peerId = Buffer.from('-RS0001-abcdefghijkl')
export const testHash = (byte: number) => infoHashFromHex(byte.toString(16).padStart(2, '0').repeat(20))

/** A leecher that starts, but for what is given. */
export function announceFields(over: Partial<UdpAnnounceFields> = {}): UdpAnnounceFields {
  return {
    infoHash: testHash(0xaa),
    peerId,
    port: 6881,
    uploaded: 0,
    downloaded: 0,
    left: 1,
    event: undefined,
    ...over,
  }
}

/** The query of an announce over HTTP; `more` is added as it stands. */
export function announceQuery(over: Partial<UdpAnnounceFields> = {}, more = ''): string {
  const fields = announceFields(over)
  const pairs = [
    `info_hash=${escapeBytes(infoHashToBytes(fields.infoHash))}`,
    `peer_id=${escapeBytes(fields.peerId)}`,
    ...(['port', 'uploaded', 'downloaded', 'left'] as const).map((key) => `${key}=${fields[key]}`),
    ...(fields.event === undefined ? [] : [`event=${fields.event}`]),
    ...(fields.numwant === undefined ? [] : [`numwant=${fields.numwant}`]),
    ...(more === '' ? [] : [more]),
  ]
  return pairs.join('&')
}

export interface HttpAnswer {
  readonly status: number
  /** latin1: one character a byte. */
  readonly body: string
}

/** One GET on a connection of its own; the path goes out as it stands. */
export async function httpGet(
  address: Address,
  path: string,
  options: { from?: string; headers?: OutgoingHttpHeaders; signal?: AbortSignal } = {},
): Promise<HttpAnswer> {
  const { from, headers, signal } = options
  return new Promise((resolve, reject) => {
    const request = get(
      {
        ...address,
        path,
        agent: false,
        ...(from !== undefined && { localAddress: from }),
        ...(headers && { headers }),
        ...(signal && { signal }),
      },
      (response) => {
        let body = ''
        response.setEncoding('latin1').on('data', (chunk: string) => (body += chunk))
        response.once('error', reject).once('end', () => {
          resolve({ status: response.statusCode ?? 0, body })
        })
      },
    )
    request.once('error', reject)
  })
}

export type Dictionary = ReadonlyMap<string, Bencoded>

/** The bencoded dictionary of a reply. */
export function bencoded(body: string): Dictionary {
  const value = decode(Buffer.from(body, 'latin1'))
  if (!(value instanceof Map)) throw new Error(`No dictionary: ${JSON.stringify(body)}`)
  return value
}

export function text(value: Bencoded | undefined): string {
  if (!(value instanceof Uint8Array)) throw new Error('No text')
  return Buffer.from(value).toString('latin1')
}

export function failure(reason: string): string {
  return `d14:failure reason${reason.length}:${reason}e`
}

/** A UDP socket that sends what it is told to, to one address. */
export interface UdpProbe {
  /** All replies to some packets. Whatever is answered at once comes before the reply to a connect that is sent behind them. */
  replies(...packets: readonly Uint8Array[]): Promise<Buffer[]>
  /** The reply with the packet's transaction id. */
  ask(packet: Uint8Array): Promise<Buffer>
  connectionId(): Promise<Uint8Array>
}

/** A packet on loopback is lost only where a queue is full. */
const replyTimeoutMs = 5000

export async function udpProbe(
  t: Owner,
  { host, port }: Address,
  options: { from?: string; replyTimeoutMs?: number } = {},
): Promise<UdpProbe> {
  const socket = createSocket(host.includes(':') ? 'udp6' : 'udp4')
  t.after(() => {
    socket.close()
  })
  const received: Buffer[] = []
  let wake: () => void = () => undefined
  socket.on('message', (packet: Buffer) => {
    received.push(packet)
    wake()
  })
  // A refused packet is one without a reply.
  socket.on('error', () => undefined)
  socket.bind({ port: 0, ...(options.from !== undefined && { address: options.from }) })
  await once(socket, 'listening')
  socket.connect(port, host)
  await once(socket, 'connect')
  let transactions = 0xfe_00_00_00

  /** Takes packets until one has this transaction id. */
  const until = async (transactionId: number): Promise<Buffer[]> => {
    const deadline = performance.now() + (options.replyTimeoutMs ?? replyTimeoutMs)
    for (;;) {
      const index = received.findIndex((packet) => readUdpReplyTransactionId(packet) === transactionId)
      if (index >= 0) return received.splice(0, index + 1)
      const leftMs = deadline - performance.now()
      if (leftMs <= 0) throw new Error(`No reply to a packet within its time, but ${received.length} others`)
      const timer = setTimeout(() => {
        wake()
      }, leftMs)
      await new Promise<void>((resolve) => (wake = resolve))
      clearTimeout(timer)
    }
  }
  const connect = async () => {
    const transactionId = transactions++
    socket.send(writeUdpConnect(transactionId))
    return until(transactionId)
  }
  return {
    replies: async (...packets) => {
      for (const packet of packets) socket.send(packet)
      return (await connect()).slice(0, -1)
    },
    ask: async (packet) => {
      socket.send(packet)
      return (await until(Buffer.from(packet).readUInt32BE(12))).at(-1) ?? Buffer.alloc(0)
    },
    connectionId: async () => parseUdpConnectReply((await connect()).at(-1) ?? Buffer.alloc(0)),
  }
}

/** The text of an error reply; fails for any other. */
export function udpError(packet: Buffer | undefined): string {
  if (packet?.readUInt32BE(0) !== 3)
    throw new Error(`No error reply: ${packet?.toString('hex', 0, 64) ?? 'nothing'}`)
  if (packet.at(-1) !== 0) throw new Error('The text is not ended by a zero byte')
  return packet.toString('utf8', 8, packet.length - 1)
}

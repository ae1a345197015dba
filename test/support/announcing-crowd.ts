// Many peers that come, fetch, seed and go, over real sockets, and what a tracker that never fails would have told them.
import { Agent, get } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { endpointPort } from '../../lib/protocol/address.ts'
import type { AnnounceEvent } from '../../lib/protocol/announce.ts'
import { parseAnnounceReply, writeAnnounce } from '../../lib/protocol/announce.ts'
import { decode } from '../../lib/protocol/bencode.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { InfoHash } from '../../lib/protocol/infohash.ts'
import { infoHashToBytes } from '../../lib/protocol/infohash.ts'
import { escapeBytes } from '../../lib/protocol/query.ts'
import type { Range, WrongPeer } from './swarm-model.ts'
import { SwarmModel } from './swarm-model.ts'
import { until } from './until.ts'

export interface CrowdOptions {
  /** Where all of them announce: `http://HOST:PORT`. */
  readonly url: string
  readonly peers: number
  readonly swarms: readonly CrowdSwarm[]
  /** How old what a tracker says may be. */
  readonly staleMs?: number
  /** 0 ≤ random() < 1. */
  readonly random?: () => number
}

export interface CrowdSwarm {
  readonly infoHash: InfoHash
  /** Each peer shows one of them; none where the tracker wants none. */
  readonly tokens: readonly string[]
}

/** Since the start. Each announce ends as one of answered, refused and failed. */
export interface CrowdCounts {
  answered: number
  /** An answer came, and it was no. */
  refused: number
  /** No answer came, even after it was sent again. */
  failed: number
  /** The connection ended before the answer began; then it was sent again on a new one, as HTTP lets a client do with a GET. */
  sentAgain: number
  handedOut: number
  wrong: Record<WrongPeer, number>
  /** Of answered ones, the longest, ms. */
  slowestMs: number
}

export interface AnnouncingCrowd extends AsyncDisposable {
  readonly swarms: readonly CrowdSwarm[]
  readonly counts: CrowdCounts
  /** What went wrong, in words, with how often. */
  readonly complaints: ReadonlyMap<string, number>
  /** Resolves when every peer has announced once. */
  started(): Promise<void>
  /** From here on peers stay what they are and only announce again. Resolves when no change is under way. */
  calm(): Promise<void>
  /** As at the start. */
  stir(): void
  /** What a tracker should say of a swarm now; one that has forgotten everything then (ms of performance.now()) may know less. */
  expected(swarm: number, forgottenAtMs?: number): { complete: Range; incomplete: Range }
  /** How long those took that were answered since the last call, ms. */
  takeDurations(): number[]
}

/** An announce that took so long has failed. */
const deadlineMs = 10_000
const triesMax = 3
/** Announces of a peer while it fetches, and while it seeds. */
const leecherAnnounces = { least: 2, most: 8 }
const seederAnnounces = { least: 1, most: 3 }
/** How many go without a word. */
const silentShare = 0.15
const durationsMax = 200_000
const complaintsMax = 100
/** All peers come within this long. */
const arrivalMs = 2000

export function startCrowd(options: CrowdOptions): AnnouncingCrowd {
  const { url, random = Math.random, staleMs = 5000 } = options
  const { hostname, port } = new URL(url)
  const models = options.swarms.map(() => new SwarmModel(staleMs))
  const nextPort = options.swarms.map(() => 1024)
  const counts: CrowdCounts = {
    answered: 0,
    refused: 0,
    failed: 0,
    sentAgain: 0,
    handedOut: 0,
    wrong: { unknown: 0, stopped: 0, expired: 0, self: 0, twice: 0 },
    slowestMs: 0,
  }
  const complaints = new Map<string, number>()
  const ending = new AbortController()
  let durations: number[] = []
  let changes = 0
  let isCalm = false
  let stirred = Promise.withResolvers<undefined>()

  const complain = (text: string) => {
    if (complaints.size < complaintsMax || complaints.has(text))
      complaints.set(text, (complaints.get(text) ?? 0) + 1)
  }
  /** @returns the interval in seconds, or undefined where it was not answered */
  const announce = async (
    peer: Peer,
    { left, event }: { left: number; event: AnnounceEvent | undefined },
  ): Promise<number | undefined> => {
    const model = models[peer.swarm]
    const { infoHash } = options.swarms[peer.swarm] ?? {}
    if (!model || infoHash === undefined) throw new Error(`There is no swarm ${peer.swarm}`)
    const state = { seeder: left === 0, stopped: event === 'stopped' }
    const query = writeAnnounce({
      infoHash,
      peerId,
      port: peer.port,
      uploaded: 0,
      downloaded: 0,
      left,
      event,
      jwt: peer.token,
    })
    const startedAt = performance.now()
    model.asks(peer.port, { ...state, atMs: startedAt })
    for (let tries = 1; ; tries++) {
      const askedAt = performance.now()
      try {
        const answer = await ask(peer.agent, { hostname, port, path: `/announce?${query}` })
        const now = performance.now()
        if (answer.status !== 200) throw new ClientError('tracker_failure', `status ${answer.status}`)
        const reply = parseAnnounceReply(answer.body)
        model.answered(peer.port, { ...state, intervalSeconds: reply.intervalSeconds, atMs: now })
        const ports = reply.peers.map(({ endpoint }) => endpointPort(endpoint))
        for (const fault of model.wrongIn(peer.port, ports, askedAt)) counts.wrong[fault]++
        counts.answered++
        counts.handedOut += ports.length
        counts.slowestMs = Math.max(counts.slowestMs, now - startedAt)
        if (durations.length < durationsMax) durations.push(now - startedAt)
        return reply.intervalSeconds
      } catch (error) {
        if (ending.signal.aborted) return undefined
        if (error instanceof ClientError) {
          model.failed(peer.port, { atMs: performance.now() })
          counts.refused++
          complain(`refused: ${error.message}`)
          return undefined
        }
        if (error instanceof ConnectionLost && tries < triesMax) {
          counts.sentAgain++
          complain(`sent again: ${error.message}`)
          continue
        }
        model.failed(peer.port, { atMs: performance.now() })
        counts.failed++
        complain(`failed: ${(error as Error).message}`)
        return undefined
      }
    }
  }

  /** Announces until the crowd is no longer calm. */
  const wait = async (peer: Peer, left: number) => {
    while (isCalm && !ending.signal.aborted)
      await pause(left, await announce(peer, { left, event: undefined }))
  }
  const change = async (peer: Peer, to: Parameters<typeof announce>[1]) => {
    changes++
    try {
      return await announce(peer, to)
    } finally {
      changes--
    }
  }
  const pause = async (left: number, intervalSeconds: number | undefined) => {
    const waitMs = (intervalSeconds ?? (left > 0 ? 1 : 5)) * 1000 * (0.9 + random() / 10)
    await sleep(waitMs, undefined, { signal: ending.signal }).catch(() => undefined)
  }

  const live = async (swarm: number, firstAnnounced: () => void): Promise<void> => {
    const { tokens = [] } = options.swarms[swarm] ?? {}
    const own = nextPort[swarm] ?? 0
    nextPort[swarm] = own === 65535 ? 1024 : own + 1
    const peer = {
      swarm,
      port: own,
      token: tokens[Math.floor(random() * tokens.length)],
      agent: new Agent({ keepAlive: true, maxSockets: 1 }),
    }
    try {
      if (isCalm) await stirred.promise
      let intervalSeconds = await change(peer, { left: 1, event: 'started' })
      firstAnnounced()
      const stay = async (left: number, { least, most }: { least: number; most: number }) => {
        for (
          let i = least + Math.floor(random() * (most - least + 1));
          i > 0 && !ending.signal.aborted;
          i--
        ) {
          await pause(left, intervalSeconds)
          intervalSeconds = await announce(peer, { left, event: undefined })
        }
        await pause(left, intervalSeconds)
        await wait(peer, left)
      }
      await stay(1, leecherAnnounces)
      intervalSeconds = await change(peer, { left: 0, event: 'completed' })
      await stay(0, seederAnnounces)
      if (random() >= silentShare) await change(peer, { left: 0, event: 'stopped' })
    } finally {
      peer.agent.destroy()
    }
  }

  const arrivals: Promise<void>[] = []
  const living = Array.from({ length: options.peers }, async (_, i) => {
    const arrived = Promise.withResolvers<undefined>()
    arrivals.push(arrived.promise)
    await sleep(random() * arrivalMs, undefined, { signal: ending.signal }).catch(() => undefined)
    while (!ending.signal.aborted)
      await live(i % options.swarms.length, () => {
        arrived.resolve(undefined)
      })
    arrived.resolve(undefined)
  })

  return {
    swarms: options.swarms,
    counts,
    complaints,
    started: async () => {
      await Promise.all(arrivals)
    },
    calm: async () => {
      if (!isCalm) stirred = Promise.withResolvers()
      isCalm = true
      await until('no announce is under way', () => changes === 0, { withinMs: 2 * deadlineMs })
    },
    stir: () => {
      isCalm = false
      stirred.resolve(undefined)
    },
    expected: (swarm, forgottenAtMs) => {
      const model = models[swarm]
      if (!model) throw new Error(`There is no swarm ${swarm}`)
      return model.counts(performance.now(), forgottenAtMs)
    },
    takeDurations: () => {
      const taken = durations
      durations = []
      return taken
    },
    [Symbol.asyncDispose]: async () => {
      ending.abort()
      stirred.resolve(undefined)
      await Promise.all(living)
    },
  }
}

interface Peer {
  readonly swarm: number
  readonly port: number
  readonly token: string | undefined
  readonly agent: Agent
}

const peerId = Buffer.from('-RS0001-abcdefghijkl')

/** The connection ended, or was not made, before the answer began. */
class ConnectionLost extends Error {
  override readonly name = 'ConnectionLost'
}

async function ask(
  agent: Agent,
  target: { hostname: string; port: string; path: string },
): Promise<{ status: number; body: Buffer }> {
  return new Promise((resolve, reject) => {
    const request = get({ ...target, agent, signal: AbortSignal.timeout(deadlineMs) }, (response) => {
      const parts: Buffer[] = []
      response.on('data', (part: Buffer) => parts.push(part))
      response.once('error', reject)
      response.once('end', () => {
        resolve({ status: response.statusCode ?? 0, body: Buffer.concat(parts) })
      })
    })
    request.once('error', (error: NodeJS.ErrnoException) => {
      const { code = '' } = error
      const lost = ['ECONNRESET', 'EPIPE', 'ECONNREFUSED'].includes(code)
      reject(
        lost ? new ConnectionLost(`${code} on a ${request.reusedSocket ? 'kept' : 'new'} connection`) : error,
      )
    })
  })
}

/** What a tracker says of a swarm; the tracker must let anybody scrape. */
export async function scrapeCounts(
  url: string,
  infoHash: InfoHash,
): Promise<{ complete: number; incomplete: number }> {
  const response = await fetch(`${url}/scrape?info_hash=${escapeBytes(infoHashToBytes(infoHash))}`)
  const reply = decode(Buffer.from(await response.arrayBuffer()))
  const files = reply instanceof Map ? reply.get('files') : undefined
  const [counts] = files instanceof Map ? [...files.values()] : []
  const count = (key: string) => (counts instanceof Map ? Number(counts.get(key) ?? 0) : 0)
  if (!(files instanceof Map)) throw new Error(`Cannot scrape ${url}: status ${response.status}`)
  return { complete: count('complete'), incomplete: count('incomplete') }
}

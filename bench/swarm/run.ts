import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { pieceLengthFor } from '../../lib/protocol/metainfo.ts'
import type { Bounds } from '../../simulator/bound.ts'
import { boundsOf } from '../../simulator/bound.ts'
import type { Scenario } from '../../simulator/scenario.ts'
import { rackSizesOf } from '../../simulator/scenario.ts'
import { writeRandomFile } from '../../test/support/fleet.ts'
import { readTotalCpu } from '../proc.ts'
import type { Deeds, FaultPlan } from './faults.ts'
import { planFaults, shareOf } from './faults.ts'
import type { SwarmServer } from './fleet.ts'
import { startSwarmServer } from './fleet.ts'
import type { Build, Host } from './hosts.ts'
import { createHost } from './hosts.ts'
import { sendToAll } from './multicast.ts'
import type { Counters, LinkShape, SwarmNetwork } from './network.ts'
import { startSwarmNetwork } from './network.ts'
import type { ClientKind, SwarmSide } from './sides.ts'

export interface RunOptions {
  readonly scenario: Scenario
  readonly side: SwarmSide
  readonly links: LinkShape
  /** Of this run alone; removed at its end. */
  readonly directory: string
  readonly random: () => number
  readonly signal: AbortSignal
  readonly say: (text: string) => void
}

export interface HostOutcome {
  readonly index: number
  readonly rack: number
  readonly client: ClientKind | 'udpcast'
  /** Seconds from when the tag was visible until it knew of it, and until it had all, verified and exposed. */
  readonly heard: number | undefined
  readonly seconds: number | undefined
  readonly isHit: boolean
  /** For good. */
  readonly isGone: boolean
}

export interface RunOutcome {
  readonly hosts: readonly HostOutcome[]
  readonly bounds: Bounds
  /** The longest that a fault kept something away. */
  readonly outageSeconds: number
  /** What the interfaces carried, headers included. */
  readonly intoRacks: readonly number[]
  readonly originBytes: number
  readonly outOfHosts: readonly number[]
  /** Of all builds, and the least that must go into the racks. */
  readonly bytes: number
  readonly crossRackMin: number
  /** Share of all cores that was busy, from the tag to the last host. */
  readonly cpu: number
  /** Copies whose SHA-256, read back at the end, is not the right one. */
  readonly wrongCopies: number
  /** What was done to the swarm, seconds after the tag. */
  readonly events: readonly { readonly seconds: number; readonly what: string }[]
}

/** A small build first: agents are then warm, as those are that have been up for a while. As much as a host's link carries in so long, within bounds. */
const warmUpSeconds = 2
const warmUpBytesMin = 1024 * 1024
const warmUpBytesMax = 16 * 1024 * 1024
const warmUpTimeoutMs = 120_000
/** Programs that are started at once. */
const startsAtOnce = 6
const settleMs = 3_000
const lookAtServerMs = 100
/** A server that sends less than this share of its uplink for this long only answers reports. */
const quietMs = 1_000
const quietShare = 0.1
/** Of what an interface counts, for each byte of the build: headers, and what the server has to say besides. */
const overhead = 1.07
const progressMs = 10_000
/** A run is given up after so many bounds, and this long. */
const boundsMax = 8
const extraMs = 120_000

/** Builds network and swarm, publishes, waits for every host, and takes everything down again. */
export async function runSwarm(options: RunOptions): Promise<RunOutcome> {
  const { scenario, side, directory, links, signal } = options
  await using stack = new AsyncDisposableStack()
  await mkdir(directory, { recursive: true })
  stack.defer(() => rm(directory, { recursive: true, force: true }))
  const rackSizes = rackSizesOf(scenario)
  const network = stack.use(
    await startSwarmNetwork({
      rackSizes,
      hostRate: scenario.host_uplink,
      rackRate: scenario.rack_uplink,
      serverRate: scenario.server_uplink ?? scenario.host_uplink,
      links,
    }),
  )
  const builds = await Promise.all(
    Array.from({ length: scenario.releases }, async (_, i) => {
      const file = join(directory, `build-${i}.bin`)
      return { repository: `build-${i}`, file, sha256: await writeRandomFile(file, scenario.size) }
    }),
  )
  signal.throwIfAborted()
  const bounds = boundsOf(scenario, Math.ceil(scenario.size / pieceLengthFor(scenario.size)), rackSizes)
  const run = { ...options, network, rackSizes, builds, bounds }
  const bytes = scenario.size * scenario.releases
  const measured = side.isMulticast
    ? await runMulticast(run)
    : await runTracked(await startTracked(run, stack))
  return { ...measured, bounds, bytes, crossRackMin: rackSizes.length * bytes }
}

/** One run, and what it is done with. */
interface Run extends RunOptions {
  readonly network: SwarmNetwork
  readonly rackSizes: readonly number[]
  readonly builds: readonly Build[]
  readonly bounds: Bounds
}

type Measured = Omit<RunOutcome, 'bounds' | 'bytes' | 'crossRackMin'>

/** A server and its hosts, all with the first small build. */
interface Swarm extends Run {
  readonly server: SwarmServer
  readonly hosts: readonly Host[]
  readonly plan: FaultPlan
  /** Resolves with whether it came to be so within the time. */
  readonly until: (isSo: () => boolean, timeoutMs: number) => Promise<boolean>
  readonly publish: (file: string, reference: string) => Promise<string>
  /** While this file is there, announces get no answer. */
  readonly silenceFile: string
}

async function startTracked(run: Run, stack: AsyncDisposableStack): Promise<Swarm> {
  const { network, directory, scenario, side, builds, bounds, rackSizes, signal, random, say } = run
  const silenceFile = join(directory, 'silence')
  const server = stack.use(
    await startSwarmServer(
      network.server,
      directory,
      side.server?.(scenario) ??
        `prehooks:\n  - { name: ${join(import.meta.dirname, 'silence.ts')}, options: { file: ${silenceFile} } }\n`,
    ),
  )
  const news = new EventTarget()
  const standard = shareOf(scenario.hosts, scenario.standard_clients, random)
  const hosts = network.hosts.map((station) =>
    stack.use(
      createHost(station, {
        directory: join(directory, `host-${station.index}`),
        client: side.everyHost ?? (standard.has(station.index) ? 'aria2' : 'agent'),
        server,
        builds,
        settings: scenario.standard_clients > 0 ? 'peers: any\n' : '',
        changed: () => news.dispatchEvent(new Event('change')),
      }),
    ),
  )
  const plan = planFaults(scenario, { hosts: network.hosts, rackCount: rackSizes.length, bounds, random })
  const swarm: Swarm = {
    ...run,
    server,
    hosts,
    plan,
    silenceFile,
    until: (isSo, timeoutMs) => untilChanged(news, isSo, timeoutMs, signal),
    publish: async (file, reference) =>
      String((await server.deployctl(['publish', file, reference, '--no-sign'], signal))['digest']),
  }
  const early = hosts.filter(({ station }) => !plan.late.has(station.index))
  say(`starting ${early.length} hosts`)
  await eachOf(early, async (host) => {
    signal.throwIfAborted()
    await host.start()
  })
  await warmUp(
    swarm,
    early.filter(({ client }) => client === 'agent'),
  )
  return swarm
}

async function warmUp(
  { builds, directory, scenario, publish, until, signal, say }: Swarm,
  agents: readonly Host[],
): Promise<void> {
  if (agents.length === 0) return
  say('warm-up')
  const file = join(directory, 'warm-up.bin')
  const wanted = Math.round(warmUpSeconds * scenario.host_uplink)
  for (const { repository } of builds) {
    await writeRandomFile(file, Math.min(warmUpBytesMax, Math.max(warmUpBytesMin, wanted)))
    const digest = await publish(file, `${repository}:warm-up`)
    const waiting = () => agents.filter((host) => host.doneAtMs(digest) === undefined)
    if (!(await until(() => waiting().length === 0, warmUpTimeoutMs))) {
      const names = waiting().map(({ station }) => station.index)
      throw new Error(
        `After ${warmUpTimeoutMs / 1000} s the first small build is not at hosts ${names.join(', ')}`,
      )
    }
  }
  await sleep(settleMs, undefined, { signal })
}

async function runTracked(swarm: Swarm): Promise<Measured> {
  const { network, scenario, builds, server, hosts, plan, bounds, publish, until, say, signal } = swarm
  for (const index of plan.slow) {
    const station = network.hosts[index]
    if (station) await network.setHostRate(station, scenario.host_uplink * (scenario.slow?.factor ?? 1))
  }
  say('publishing')
  const before = await network.readCounters()
  const digests = await Promise.all(
    builds.map(({ file, repository }) => publish(file, `${repository}:measured`)),
  )
  const busy = await watchCpu()
  const t0 = Math.min(
    ...builds.map(({ repository }, i) => server.taggedAtMs(repository, digests[i] ?? '') ?? Number.NaN),
  )
  const sinceTag = (atMs: number) => (atMs - t0) / 1000
  const events: { seconds: number; what: string }[] = []
  const happened = (what: string) => {
    events.push({ seconds: sinceTag(Date.now()), what })
    say(`${sinceTag(Date.now()).toFixed(1)} s: ${what}`)
  }
  const isDone = (host: Host) => digests.every((digest) => host.doneAtMs(digest) !== undefined)
  const expected = () => hosts.filter(({ station }) => !plan.gone.has(station.index))
  const progress = setInterval(() => {
    say(
      `${sinceTag(Date.now()).toFixed(0)} s: ${expected().filter(isDone).length} of ${expected().length} hosts`,
    )
  }, progressMs)
  const faults = startFaults(swarm, isDone, t0, happened)
  try {
    await fetchByForeign(swarm)
    const timeoutMs = (boundsMax * bounds.seconds + plan.outageSeconds) * 1000 + extraMs
    const all = until(() => expected().every(isDone), timeoutMs)
    if (!(await Promise.race([all, faults.failed]))) happened('given up')
  } finally {
    clearInterval(progress)
    await faults[Symbol.asyncDispose]()
  }
  const cpu = await busy()
  const after = await network.readCounters()
  signal.throwIfAborted()
  const copies = hosts
    .filter(isDone)
    .flatMap((host) => builds.map((build) => ({ file: host.copyOf(build), sha256: build.sha256 })))
  const last = (times: readonly (number | undefined)[]) =>
    times.includes(undefined) ? undefined : sinceTag(Math.max(...times.map((at) => at ?? 0)))
  return {
    hosts: hosts.map((host) => ({
      index: host.station.index,
      rack: host.station.rack,
      client: host.client,
      heard: last(digests.map((digest) => host.heardAtMs(digest))),
      seconds: last(digests.map((digest) => host.doneAtMs(digest))),
      isHit: plan.hit.has(host.station.index),
      isGone: plan.gone.has(host.station.index),
    })),
    outageSeconds: plan.outageSeconds,
    ...trafficBetween(before, after),
    cpu,
    wrongCopies: await countWrong(copies, say),
    events,
  }
}

/** Hosts with other clients are told of the torrent at once. */
async function fetchByForeign({ hosts, directory, server, builds, side, signal }: Swarm): Promise<void> {
  const foreign = hosts.filter(({ client }) => client !== 'agent')
  if (foreign.length === 0) return
  const torrent = join(directory, 'build.torrent')
  const only = side.everyHost === undefined ? ['--no-webseed'] : []
  await server.deployctl(
    ['torrent', `${builds[0]?.repository ?? ''}:latest`, '--output', torrent, ...only],
    signal,
  )
  for (const host of foreign) host.fetch(torrent)
}

/** Does what is planned, when it is. `failed` never resolves, and rejects when something could not be done. */
function startFaults(
  swarm: Swarm,
  isDone: (host: Host) => boolean,
  t0: number,
  happened: (what: string) => void,
) {
  const { plan, hosts, network, server, silenceFile } = swarm
  const ended = new AbortController()
  const failed = Promise.withResolvers<never>()
  failed.promise.catch(() => undefined)
  const hostOf = (index: number) => hosts[index]
  const deeds: Deeds = {
    kill: async ({ index }) => hostOf(index)?.kill(),
    start: async ({ index }) => hostOf(index)?.start(),
    gatewayOf: async (rack) => {
      const fetching = hosts.filter((host) => host.station.rack === rack && !isDone(host))
      const brought = await Promise.all(
        fetching.map(async (host) => ({ host, bytes: await host.bytesFromOutside() })),
      )
      return brought.toSorted((a, b) => b.bytes - a.bytes)[0]?.host.station
    },
    setRackRate: (rack, rate) => network.setRackRate(rack, rate),
    killServer: () => server.kill(),
    startServer: () => server.start(),
    silenceTracker: (silent) => (silent ? writeFile(silenceFile, '') : rm(silenceFile, { force: true })),
  }
  const attempt = async (work: () => Promise<void>) => {
    try {
      await work()
    } catch (error) {
      if (!ended.signal.aborted) failed.reject(error)
    }
  }
  const works = plan.deeds.map(({ atMs, what, act }) => async () => {
    await sleep(Math.max(0, t0 + atMs - Date.now()), undefined, { signal: ended.signal })
    happened(what)
    await act(deeds)
  })
  const copies = plan.serverDiesAfter
  if (copies !== undefined)
    works.push(async () => {
      const sent = await untilSent(swarm, copies, ended.signal)
      happened(`the server dies, having sent ${sent.toFixed(2)} copies`)
      await server.kill()
    })
  const doing = Promise.all(works.map(attempt))
  return {
    failed: failed.promise,
    [Symbol.asyncDispose]: async () => {
      ended.abort()
      await doing
    },
  }
}

/** Resolves once the server has sent so many copies, or one and then next to nothing: it may never send more. @returns how many */
async function untilSent({ network, scenario }: Swarm, copies: number, signal: AbortSignal): Promise<number> {
  const rate = scenario.server_uplink ?? scenario.host_uplink
  const bytes = scenario.size * scenario.releases
  const atStart = await network.readServerBytes()
  let earlier = 0
  for (let looks = 1; ; looks++) {
    const sent = ((await network.readServerBytes()) - atStart) / overhead
    if (sent >= copies * bytes) return sent / bytes
    if ((looks * lookAtServerMs) % quietMs === 0) {
      if (sent >= bytes && sent - earlier < (rate * quietShare * quietMs) / 1000) return sent / bytes
      earlier = sent
    }
    await sleep(lookAtServerMs, undefined, { signal })
  }
}

async function runMulticast(run: Run): Promise<Measured> {
  const { network, say } = run
  const before = await network.readCounters()
  const busy = await watchCpu()
  const { hosts, copies } = await sendToAll(run)
  const cpu = await busy()
  const after = await network.readCounters()
  return {
    hosts,
    outageSeconds: 0,
    ...trafficBetween(before, after),
    cpu,
    wrongCopies: await countWrong(copies, say),
    events: [],
  }
}

/** Starts to watch. @returns what ends it, with the share of all cores that was busy */
async function watchCpu(): Promise<() => Promise<number>> {
  const before = await readTotalCpu()
  return async () => {
    const after = await readTotalCpu()
    return (after.busySeconds - before.busySeconds) / (after.totalSeconds - before.totalSeconds)
  }
}

function trafficBetween(before: Counters, after: Counters) {
  const grown = (key: 'intoRacks' | 'outOfHosts') =>
    after[key].map((bytes, i) => bytes - (before[key][i] ?? 0))
  return {
    intoRacks: grown('intoRacks'),
    originBytes: after.fromServer - before.fromServer,
    outOfHosts: grown('outOfHosts'),
  }
}

export interface Copy {
  readonly file: string
  readonly sha256: string
}

async function countWrong(copies: readonly Copy[], say: (text: string) => void): Promise<number> {
  say('reading copies back')
  let wrong = 0
  for (const { file, sha256 } of copies) {
    const hash = createHash('sha256')
    await pipeline(createReadStream(file, { highWaterMark: 1024 * 1024 }), hash)
    if (hash.digest('hex') !== sha256) wrong++
  }
  return wrong
}

async function untilChanged(
  news: EventTarget,
  isSo: () => boolean,
  timeoutMs: number,
  signal: AbortSignal,
): Promise<boolean> {
  signal.throwIfAborted()
  if (isSo()) return true
  const decided = Promise.withResolvers<boolean>()
  const look = () => {
    if (isSo()) decided.resolve(true)
  }
  const stop = () => {
    decided.reject(signal.reason as Error)
  }
  const timer = setTimeout(decided.resolve, timeoutMs, false)
  news.addEventListener('change', look)
  signal.addEventListener('abort', stop)
  try {
    return await decided.promise
  } finally {
    clearTimeout(timer)
    news.removeEventListener('change', look)
    signal.removeEventListener('abort', stop)
  }
}

async function eachOf<Item>(items: readonly Item[], act: (item: Item) => Promise<void>): Promise<void> {
  const queue = items.values()
  await Promise.all(
    Array.from({ length: startsAtOnce }, async () => {
      for (const item of queue) await act(item)
    }),
  )
}

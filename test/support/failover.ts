// A fleet under way while something fails: several servers, agents that fetch a build, a crowd that announces, and what must be true afterwards.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import { createHttpClient } from '../../lib/client/http.ts'
import { createServerClient } from '../../lib/client/server-client.ts'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'
import type { AnnouncingCrowd, CrowdCounts, CrowdSwarm } from './announcing-crowd.ts'
import { scrapeCounts, startCrowd } from './announcing-crowd.ts'
import type { FleetAgent } from './fleet.ts'
import { deployctlOk, refreshFile, startFleetAgent, writeRandomFile } from './fleet.ts'
import { ociClient, sha256Of } from './oci.ts'
import type { FleetMember, FleetRedis, ServerFleet } from './server-fleet.ts'
import { startServerFleet } from './server-fleet.ts'
import { until } from './until.ts'

export interface DrillOptions {
  readonly redis: FleetRedis['kind']
  readonly servers?: number
  readonly agents: number
  readonly buildBytes: number
  /** Of each agent, bytes a second: what an undisturbed deploy takes follows from it. */
  readonly downloadRate: number
  readonly peers: number
  /** The shortest interval between announces, seconds. */
  readonly intervalSeconds: number
  readonly clocksOffSeconds?: readonly number[]
}

/** What fails, and for how long nobody could have done better: 0 where a way that works is left. */
export interface Fault {
  readonly name: string
  /** How many that are; each may add five seconds. Default: 1. */
  readonly faults?: number
  /** What was announced before its end may be forgotten, until it is announced again. */
  readonly forgets?: boolean
  /** Resolves when it is over. @returns the seconds of the outage */
  run(fleet: ServerFleet): Promise<number>
}

export interface DrillResult {
  readonly name: string
  readonly faults: number
  /** From the build being published to the last agent having it. */
  readonly seconds: number
  readonly outageSeconds: number
  /** After the deploy and the fault, until each server said of each swarm what a tracker that never fails would say. */
  readonly countsRightAfterSeconds: number
  readonly crowd: Pick<CrowdCounts, 'answered' | 'refused' | 'failed' | 'sentAgain' | 'handedOut' | 'wrong'>
  readonly p99Ms: number
  readonly slowestMs: number
  /** Requests that servers had under way when they ended. */
  readonly cutUnderWay: number
  /** What the crowd met, in words. */
  readonly complaints: readonly string[]
}

export interface Drill extends AsyncDisposable {
  readonly fleet: ServerFleet
  readonly crowd: AnnouncingCrowd
  /**
   * Publishes a new build and waits until every agent has it; the fault comes once a quarter of it is there.
   *
   * @throws AssertionError when a deploy does not end, counts stay wrong, or something that was published is gone
   */
  deploy(fault: Fault): Promise<DrillResult>
}

/** How old what a tracker says may be. */
const staleMs = 5000
const swarmsOfCrowd = 8
const racks = ['a', 'b', 'c']
const countsRightWithinMs = 30_000
const stateAnswersWithinMs = 15_000
/** Over what an undisturbed deploy takes: when to give up. */
const deployTimeoutMs = 120_000

export async function startDrill(directory: string, options: DrillOptions): Promise<Drill> {
  const { agents, downloadRate, intervalSeconds } = options
  await using started = new AsyncDisposableStack()
  const fleet = started.use(
    await startServerFleet(directory, {
      redis: options.redis,
      servers: options.servers ?? 3,
      ...(options.clocksOffSeconds && { clocksOffSeconds: options.clocksOffSeconds }),
      settings: `shutdown_delay: 1s
min_announce_interval: ${intervalSeconds}s
announce_interval: ${10 * intervalSeconds}s
tracker: { scrape_networks: [127.0.0.0/8] }
enrolment: { first_token_places: any, report_interval: 1s }
`,
    }),
  )
  const { door } = fleet
  const admin = (await readFile(door.adminTokenFile, 'utf8')).trim()
  const crowd = started.use(
    startCrowd({
      url: door.publicUrl,
      peers: options.peers,
      swarms: await swarmsFor(door.publicUrl, admin),
      staleMs,
    }),
  )
  const hosts = await Promise.all(
    Array.from({ length: agents }, async (_, i) => {
      const rack = racks[i % racks.length] ?? ''
      const host = `${rack}${i}`
      return started.use(
        await startFleetAgent(join(directory, host), door, {
          host,
          place: rack,
          extra: `follow: ["web:latest"]\nfollow_jitter: 100ms\nlimits: { download: ${Math.round(downloadRate)}B, upload: ${Math.round(4 * downloadRate)}B }\n`,
        }),
      )
    }),
  )
  const build = join(directory, 'build.tar')
  await writeRandomFile(build, options.buildBytes)
  const record = await publishFirst(fleet, admin)
  await crowd.started()
  let deploys = 0

  const deploy = async (fault: Fault): Promise<DrillResult> => {
    const before = structuredClone(crowd.counts)
    const cutBefore = cutUnderWayOf(fleet)
    const saidBefore = new Map(crowd.complaints)
    crowd.takeDurations()
    await refreshFile(build)
    const tag = String(++deploys)
    const published = JSON.parse(await deployctlOk(door, ['publish', build, `web:${tag}`, '--json'])) as {
      digest: string
      file: { digest: string }
    }
    const startedAt = performance.now()
    record.releases.push({ tag, digest: published.digest, layer: published.file.digest })
    const ended = Promise.all(hosts.map((host) => untilHeld(host, published.digest))).then(() =>
      performance.now(),
    )
    // A fault that throws ends the drill; the deploy then has nobody who waits for it.
    ended.catch(() => undefined)
    await untilBytes(hosts, published.digest, options.buildBytes / 4)
    const outageSeconds = await fault.run(fleet)
    const overAt = performance.now()
    const seconds = ((await ended) - startedAt) / 1000
    const countsRightAfterSeconds = await untilCountsRight(
      fleet,
      crowd,
      fault.forgets === true ? overAt : undefined,
    )
    await untilStateAnswers(fleet, admin)
    await assertNothingLost(fleet, record, admin)
    const durations = crowd.takeDurations().sort((a, b) => a - b)
    const since = (key: 'answered' | 'refused' | 'failed' | 'sentAgain' | 'handedOut') =>
      crowd.counts[key] - before[key]
    const { wrong } = crowd.counts
    return {
      name: fault.name,
      faults: fault.faults ?? 1,
      seconds,
      outageSeconds,
      countsRightAfterSeconds,
      crowd: {
        answered: since('answered'),
        refused: since('refused'),
        failed: since('failed'),
        sentAgain: since('sentAgain'),
        handedOut: since('handedOut'),
        wrong: {
          unknown: wrong.unknown - before.wrong.unknown,
          stopped: wrong.stopped - before.wrong.stopped,
          expired: wrong.expired - before.wrong.expired,
          self: wrong.self - before.wrong.self,
          twice: wrong.twice - before.wrong.twice,
        },
      },
      p99Ms: durations[Math.floor(durations.length * 0.99)] ?? 0,
      slowestMs: durations.at(-1) ?? 0,
      cutUnderWay: cutUnderWayOf(fleet) - cutBefore,
      complaints: [...crowd.complaints]
        .map(([text, count]) => [text, count - (saidBefore.get(text) ?? 0)] as const)
        .filter(([, count]) => count > 0)
        .map(([text, count]) => `${count} × ${text}`),
    }
  }

  const owned = started.move()
  return { fleet, crowd, deploy, [Symbol.asyncDispose]: () => owned.disposeAsync() }
}

/** What must be there after each fault. */
interface PublishedRecord {
  readonly releases: { tag: string; digest: string; layer: string }[]
  readonly pinned: string
  readonly goodToken: string
  readonly revokedToken: string
}

export const noFault: Fault = { name: 'undisturbed', run: async () => Promise.resolve(0) }

/** One server is gone, and comes back after a while; the others are there. */
export function serverKilled(downMs: number): Fault {
  return {
    name: 'kill -9 of a server',
    run: async ({ members }) => {
      const member = pick(members, 0)
      await member.kill()
      await sleep(downMs)
      await member.start()
      return 0
    },
  }
}

export function redisStopped(outageMs: number): Fault {
  return {
    name: 'Redis stops answering',
    run: async ({ redis }) => {
      const { server } = single(redis)
      server.kill('SIGSTOP')
      await sleep(outageMs)
      server.kill('SIGCONT')
      return outageMs / 1000
    },
  }
}

export function redisEmptied(): Fault {
  return {
    name: 'Redis comes back empty',
    forgets: true,
    run: async ({ redis }) => secondsOf(() => single(redis).restartEmpty()),
  }
}

/** No packet comes through between it and Redis, and nobody is told; the others are well. */
export function serverCutOff(outageMs: number): Fault {
  return {
    name: 'one server cut off from Redis',
    run: async ({ members }) => {
      const { redisLink } = pick(members, 1)
      if (!redisLink) throw new Error('This server has no way to Redis of its own')
      redisLink.stall()
      await sleep(outageMs)
      // What waited in the way is lost with its connections.
      redisLink.cut()
      redisLink.mend()
      return 0
    },
  }
}

export function primaryKilled(): Fault {
  return {
    name: 'kill -9 of the primary',
    run: async ({ redis }) => {
      if (redis.kind !== 'sentinel') throw new Error('This Redis has no Sentinels')
      const before = await redis.primaryPort()
      const primary = redis.servers.find(({ port }) => port === before)
      return secondsOf(async () => {
        primary?.kill('SIGKILL')
        await until('another primary', async () => (await redis.primaryPort()) !== before, {
          withinMs: 60_000,
        })
      })
    },
  }
}

export function nodeKilled(node: number, downMs: number): Fault {
  return {
    name: 'a Cluster node dies',
    run: async ({ redis }) => {
      if (redis.kind !== 'cluster') throw new Error('This Redis is no Cluster')
      return secondsOf(async () => {
        redis.nodes[node]?.kill('SIGKILL')
        await sleep(downMs)
        await redis.restart(node)
        await redis.whole()
      })
    },
  }
}

/** One after the other, as an upgrade does it: the next once the one before says that it is ready. */
export function serversUpgraded(clocksOffSeconds: readonly number[] = []): Fault {
  return {
    name: 'servers restarted one by one',
    run: async ({ members }) => {
      for (const [i, member] of members.entries()) {
        await member.stop()
        await member.start({ clockOffSeconds: clocksOffSeconds[i] ?? 0 })
        await until('it is ready', () => member.link.isReady, { withinMs: 60_000 })
      }
      return 0
    },
  }
}

/** In one deploy. */
export function oneAfterTheOther(faults: readonly Fault[]): Fault {
  return {
    name: faults.map(({ name }) => name).join(', then '),
    faults: faults.length,
    forgets: faults.some(({ forgets }) => forgets),
    run: async (fleet) => {
      let outageSeconds = 0
      for (const fault of faults) outageSeconds += await fault.run(fleet)
      return outageSeconds
    },
  }
}

/** @throws AssertionError saying what of it was wrong */
export function assertGood(result: DrillResult, undisturbedSeconds: number): void {
  const { name, crowd, outageSeconds } = result
  const details = `${name}: ${result.complaints.join('; ')}`
  assert.equal(crowd.refused, 0, details)
  assert.equal(crowd.failed, 0, details)
  assert.ok(
    crowd.sentAgain <= result.cutUnderWay,
    `${crowd.sentAgain} announces were sent again, and ${result.cutUnderWay} were under way: ${details}`,
  )
  assert.deepEqual(crowd.wrong, { unknown: 0, stopped: 0, expired: 0, self: 0, twice: 0 }, details)
  const added = result.seconds - undisturbedSeconds
  assert.ok(
    added <= outageSeconds + 5 * result.faults,
    `${name}: ${added.toFixed(1)} s more than undisturbed, with an outage of ${outageSeconds.toFixed(1)} s`,
  )
}

async function swarmsFor(publicUrl: string, admin: string): Promise<CrowdSwarm[]> {
  await using http = createHttpClient({ baseUrl: publicUrl, credential: () => admin })
  const api = createServerClient(http)
  return await Promise.all(
    Array.from({ length: swarmsOfCrowd }, async (_, i) => {
      const infoHash = (i + 1).toString(16).padStart(2, '0').repeat(20)
      const minted = await Promise.all(racks.map((rack) => api.announceToken({ infohash: infoHash, rack })))
      return { infoHash: infoHashFromHex(infoHash), tokens: minted.map(({ token }) => token) }
    }),
  )
}

async function publishFirst({ door }: ServerFleet, admin: string): Promise<PublishedRecord> {
  const { publicUrl } = door
  const client = ociClient(publicUrl, admin)
  const layer = await client.pushBlob('kept', new Uint8Array(Buffer.from('a layer that nobody changes')))
  const { digest } = await client.putManifest(
    'kept',
    { layers: [{ mediaType: 'application/octet-stream', digest: layer, size: 27 }] },
    '1',
  )
  await using http = createHttpClient({ baseUrl: publicUrl, credential: () => admin })
  const api = createServerClient(http)
  await api.pin('kept:1')
  const good = await api.createToken({ name: 'good', scopes: ['pull:*'] })
  const revoked = await api.createToken({ name: 'revoked', scopes: ['pull:*'] })
  await api.revokeToken(revoked.id)
  return {
    releases: [],
    pinned: `kept@${digest}`,
    goodToken: good.token,
    revokedToken: revoked.token,
  }
}

/** A server may still look for the new primary, say, and then says 503: that is no loss. */
async function untilStateAnswers({ members }: ServerFleet, admin: string): Promise<void> {
  for (const { url } of members)
    await until(
      `the state answers at ${url}`,
      async () => (await ociClient(url, admin).statusOf('/api/v1/pins')) !== 503,
      { withinMs: stateAnswersWithinMs },
    )
}

/** Asks every server for itself. */
async function assertNothingLost(fleet: ServerFleet, record: PublishedRecord, admin: string): Promise<void> {
  for (const member of fleet.members) {
    const client = ociClient(member.url, admin)
    for (const { tag, digest, layer } of record.releases) {
      const response = await client.call(`/v2/web/manifests/${tag}`, { method: 'HEAD' })
      assert.equal(response.headers.get('docker-content-digest'), digest, `web:${tag} on ${member.url}`)
      assert.equal(await client.headBlob('web', layer), 200, `the blob of web:${tag} on ${member.url}`)
    }
    assert.equal(await client.statusOf('/v2/kept/manifests/1', { method: 'HEAD' }), 200)
    await using http = createHttpClient({ baseUrl: member.url, credential: () => admin })
    const { pins } = await createServerClient(http).pins()
    assert.ok(
      pins.some(({ reference }) => reference.startsWith('kept')),
      `${record.pinned} is pinned no more, says ${member.url}`,
    )
    const statusWith = async (token: string) =>
      ociClient(member.url, token).statusOf('/v2/kept/manifests/1', { method: 'HEAD' })
    assert.equal(await statusWith(record.goodToken), 200, `a good token on ${member.url}`)
    assert.equal(await statusWith(record.revokedToken), 401, `a revoked token on ${member.url}`)
  }
  const newest = record.releases.at(-1)
  if (!newest) return
  const bytes = await ociClient(fleet.door.publicUrl, admin).pullBlob('web', newest.layer)
  assert.equal(bytes && sha256Of(bytes), newest.layer)
}

/** Waits until each server says of each swarm what is right. @returns the seconds it took */
async function untilCountsRight(
  { members }: ServerFleet,
  crowd: AnnouncingCrowd,
  forgottenAtMs: number | undefined,
): Promise<number> {
  await crowd.calm()
  const startedAt = performance.now()
  try {
    let wrong: string[]
    do {
      wrong = []
      for (const { url } of members)
        for (const [i, { infoHash }] of crowd.swarms.entries()) {
          const said = await scrapeCounts(url, infoHash).catch((error: unknown) => {
            wrong.push((error as Error).message)
          })
          if (!said) continue
          const { complete, incomplete } = crowd.expected(i, forgottenAtMs)
          for (const [key, range] of Object.entries({ complete, incomplete }))
            if (said[key as keyof typeof said] < range.least || said[key as keyof typeof said] > range.most)
              wrong.push(
                `${url} says ${said[key as keyof typeof said]} ${key} in ${infoHash}, need ${range.least} to ${range.most}`,
              )
        }
      if (wrong.length === 0) return (performance.now() - startedAt) / 1000
      await sleep(200)
    } while (performance.now() - startedAt < countsRightWithinMs)
    throw new assert.AssertionError({ message: wrong.slice(0, 10).join('\n') })
  } finally {
    crowd.stir()
  }
}

async function untilHeld(agent: FleetAgent, digest: string): Promise<void> {
  await using client = createAgentClient({ socketPath: agent.socketPath })
  await until(
    `${digest} is held`,
    async () =>
      (await client.status()).references.some((held) => held.digest === digest && held.state === 'held'),
    { withinMs: deployTimeoutMs },
  )
}

async function untilBytes(agents: readonly FleetAgent[], digest: string, bytes: number): Promise<void> {
  await Promise.any(
    agents.map(async ({ socketPath }) => {
      await using client = createAgentClient({ socketPath })
      await until(
        `${bytes} bytes of ${digest}`,
        async () =>
          (await client.status()).references.some(
            (held) => held.digest === digest && held.bytesDone >= bytes,
          ),
        { withinMs: deployTimeoutMs },
      )
    }),
  )
}

async function secondsOf(work: () => Promise<void>): Promise<number> {
  const startedAt = performance.now()
  await work()
  return (performance.now() - startedAt) / 1000
}

function cutUnderWayOf({ members }: ServerFleet): number {
  return members.reduce((sum, { link }) => sum + link.cutUnderWay, 0)
}

function pick(members: readonly FleetMember[], index: number): FleetMember {
  const member = members[index]
  if (!member) throw new Error(`There is no server ${index}`)
  return member
}

function single(redis: FleetRedis): Extract<FleetRedis, { kind: 'single' }> {
  if (redis.kind !== 'single') throw new Error('This Redis is more than one server')
  return redis
}

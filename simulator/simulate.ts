import type { AnnounceEvent } from '../lib/protocol/announce.ts'
import { pieceLengthFor } from '../lib/protocol/metainfo.ts'
import { createSeededRandom } from '../lib/runtime/random.ts'
import { webseedRetryMaxMs } from '../agent/engine/webseed-source.ts'
import { Agenda } from './agenda.ts'
import type { Bounds } from './bound.ts'
import { boundsOf } from './bound.ts'
import { agentConfig, Fetch } from './fetch.ts'
import type { LinkId } from './network.ts'
import { Network } from './network.ts'
import { News } from './news.ts'
import type { Moment, Scenario } from './scenario.ts'
import { rackSizesOf } from './scenario.ts'
import type { Server } from './server.ts'
import { createServer } from './server.ts'
import type { AskQueue } from './ask-queue.ts'
import type { Blob, Host, World } from './world.ts'

const tickMs = 250
/** Of real time. */
const progressMs = 5_000
const stallMs = agentConfig.stall_timeout
const webseedReviewMs = 1_000
/** A step of time is no longer than this share of the time in which a host sends a piece. */
const stepShare = 1 / 4
/** From the request for a grant to its reply. */
const grantMs = 1
/** Announces that are not answered are tried again after this long. */
const retryMs = 1_000
/** No piece has come to anybody for this long, and so many times as long as the slowest link takes for all: it will not end. */
const hungMs = 120_000
const hungBounds = 10

export interface HostResult {
  readonly index: number
  readonly rack: number
  /** Seconds from the start of the run to the last piece of the last build; undefined for one that never had it. */
  readonly seconds: number | undefined
  /** Seconds from when it could begin. */
  readonly took: number | undefined
  /** Something was done to it: it was slow, went away, came late, or was in a rack with a slow uplink. */
  readonly isHit: boolean
  /** It went away for good. */
  readonly isGone: boolean
}

export interface Result {
  readonly scenario: Scenario
  readonly pieces: number
  readonly rackSizes: readonly number[]
  readonly bounds: Bounds
  readonly hosts: readonly HostResult[]
  /** Bytes into racks from outside, and the least that they need. */
  readonly crossRackBytes: number
  readonly crossRackMin: number
  /** Bytes that the server, or the first host, has sent. */
  readonly originBytes: number
  readonly announces: number
  readonly announcesPerSecondMax: number
  readonly simulatedSeconds: number
  readonly steps: number
  readonly wallSeconds: number
}

/** How far a run is: seconds of virtual time, and hosts that have everything. */
export type Progress = (seconds: number, hosts: number) => void

/** Runs a scenario in virtual time, and says every few seconds of real time how far it is. */
export function simulate(scenario: Scenario, progress?: Progress): Result {
  return new Simulation(scenario).run(progress)
}

class Simulation {
  readonly #scenario: Scenario
  readonly #network = new Network()
  readonly #random: () => number
  /** By flow, and the rack that it leads into. */
  readonly #queues: AskQueue[] = []
  readonly #flowRack: number[] = []
  readonly #hosts: Host[] = []
  readonly #fetches: Fetch[] = []
  /** By rack: flows that have brought something, and numbers of those to be woken. */
  #settling: number[][] = []
  #woken: number[][] = []
  /** By number: 1 for each that is to be woken. */
  readonly #isWaking: Uint8Array
  readonly #blobs: readonly Blob[]
  readonly #rackSizes: number[]
  readonly #bounds: Bounds
  readonly #serverUp: LinkId[] = []
  readonly #rackDown: LinkId[] = []
  readonly #rackUp: LinkId[] = []
  readonly #agenda = new Agenda()
  #nowMs = 0
  /** When a piece came to anybody last, and the last moment at which anything was to happen. */
  #cameAtMs = 0
  #plannedUntilMs = 0
  #left = 0
  readonly #hit = new Set<Host>()
  readonly #gone = new Set<Host>()
  readonly #beganMs = new Map<Host, number>()
  #trackerAway = false
  #serverAway = false
  #isSeedGone = false
  /** Standard clients have a .torrent without the webseed where agents bring what the server has. */
  #isStandardOnly = false
  /** By the number of a fetch: how often it was started, and how often it announced, since what was planned before that is over. */
  readonly #lives: number[] = []
  readonly #announceTurns: number[] = []
  readonly #announces: number[] = []
  readonly #server: Server

  constructor(scenario: Scenario) {
    this.#scenario = scenario
    this.#isWaking = new Uint8Array(scenario.hosts * scenario.releases)
    this.#random = createSeededRandom(scenario.seed)
    const pieceLength = pieceLengthFor(scenario.size)
    this.#blobs = Array.from({ length: scenario.releases }, (_, index) => ({
      index,
      pieceCount: Math.ceil(scenario.size / pieceLength),
      pieceLength,
      length: scenario.size,
    }))
    this.#rackSizes = rackSizesOf(scenario)
    this.#bounds = boundsOf(scenario, this.#blobs[0]?.pieceCount ?? 1, this.#rackSizes)
    this.#build()
    const rows = this.#rackSizes.map((_, rack) => this.#rowOf(rack))
    this.#server = createServer(
      scenario,
      { hosts: this.#hosts, blobs: this.#blobs, rows },
      { now: () => this.#nowMs, random: this.#random },
    )
  }

  run(progress: Progress = () => undefined): Result {
    const wall = performance.now()
    let toldMs = wall
    this.#plan()
    const { host_uplink: rate, size } = this.#scenario
    const stepMs = ((Math.min(this.#blobs[0]?.pieceLength ?? 1, size) * stepShare) / rate) * 1000
    const patienceMs = hungMs + hungBounds * slowestSeconds(this.#scenario) * 1000
    let steps = 0
    const here = (flow: number): void => {
      this.#cameAtMs = this.#nowMs
      this.#settling[this.#flowRack[flow] ?? 0]?.push(flow)
    }
    while (this.#left > 0) {
      const act = this.#agenda.take(this.#nowMs)
      if (act) {
        act()
        continue
      }
      if (this.#nowMs > Math.max(this.#cameAtMs, this.#plannedUntilMs) + patienceMs) break
      if (this.#network.activeFlows === 0 && !this.#isAnyWaking()) {
        if (this.#agenda.nextMs === Infinity) break
        this.#nowMs = this.#agenda.nextMs
        continue
      }
      this.#network.step(stepMs / 1000, here)
      this.#nowMs += stepMs
      steps++
      if (steps % 64 === 0 && performance.now() - toldMs > progressMs) {
        toldMs = performance.now()
        progress(this.#nowMs / 1000, this.#hosts.filter((host) => isDone(host)).length)
      }
      this.#lookAround(steps)
      const { seed_dies: dies } = this.#scenario
      if (dies && !this.#isSeedGone && this.#originBytes() >= dies.after_copies * this.#totalBytes())
        this.#killSeed()
    }
    return this.#result(steps, (performance.now() - wall) / 1000)
  }

  /**
   * Every host takes what came, and asks for more: one rack after the other, since what hosts of a rack look at is of their rack, and so still near
   * at hand; another rack first each time.
   */
  #lookAround(step: number): void {
    const racks = this.#rackSizes.length
    for (let i = 0; i < racks; i++) {
      const rack = (step + i) % racks
      const settling = this.#settling[rack] ?? []
      for (const flow of settling) this.#queues[flow]?.settle()
      settling.length = 0
      const woken = this.#woken[rack] ?? []
      const count = woken.length
      for (let at = 0; at < count; at++) {
        const number = woken[at] ?? 0
        this.#isWaking[number] = 0
        this.#fetches[number]?.wake()
      }
      woken.splice(0, count)
    }
  }

  #isAnyWaking(): boolean {
    return this.#woken.some(({ length }) => length > 0)
  }

  #totalBytes(): number {
    return this.#scenario.size * this.#scenario.releases
  }

  #rowOf(rack: number): number {
    return rack % (this.#scenario.rows ?? 1)
  }

  #build(): void {
    const { hosts, rack_uplink: rackRate, row_uplink: rowRate, rows, host_uplink: hostRate } = this.#scenario
    const network = this.#network
    const links = (rate: number) => ({ up: network.addLink(rate), down: network.addLink(rate) })
    const rowLinks =
      rows === undefined || rowRate === undefined ? [] : Array.from({ length: rows }, () => links(rowRate))
    const rackLinks = this.#rackSizes.map(() => links(rackRate))
    for (const { up, down } of rackLinks) {
      this.#rackUp.push(up)
      this.#rackDown.push(down)
    }
    this.#serverUp.push(network.addLink(this.#scenario.server_uplink ?? hostRate))
    this.#settling = this.#rackSizes.map(() => [])
    this.#woken = this.#rackSizes.map(() => [])
    const { releases } = this.#scenario
    const racks = this.#rackSizes.flatMap((size, rack) => Array.from({ length: size }, () => rack))
    const news = new News(this.#isWaking.length)
    const wakeLater = (number: number) => {
      if (this.#isWaking[number] === 1) return
      this.#isWaking[number] = 1
      this.#woken[racks[Math.floor(number / releases)] ?? 0]?.push(number)
    }
    const world: World = {
      network,
      random: this.#random,
      nowMs: () => this.#nowMs,
      addFlow: (queue, way, rack) => {
        const flow = network.addFlow(way)
        this.#queues[flow] = queue
        this.#flowRack[flow] = rack
        return flow
      },
      finished: (fetch) => {
        this.#finished(fetch)
      },
      news,
      busyUntilMs: new Float64Array(2 * this.#isWaking.length),
      tell: (number, slot, piece) => {
        news.tell(number, slot, piece)
        wakeLater(number)
      },
      enter: (fetch) => this.#fetches.push(fetch) - 1,
      wakeLater,
      isDelayed: this.#scenario.delay > 0,
      after: (ms, act) => {
        this.#agenda.at(this.#nowMs + ms, act)
      },
      later: (ways, act) => {
        const { delay } = this.#scenario
        if (delay === 0) act()
        else this.#agenda.at(this.#nowMs + ways * delay, act)
      },
    }
    const slow = this.#share(this.#scenario.slow?.share ?? 0)
    const standard = this.#share(this.#scenario.standard_clients)
    this.#isStandardOnly = standard.size === hosts
    for (let index = 0; index < hosts; index++) {
      const rack = racks[index] ?? 0
      const isSlow = slow.has(index)
      const own = links(isSlow ? hostRate * (this.#scenario.slow?.factor ?? 1) : hostRate)
      const above = [rackLinks[rack], rowLinks[this.#rowOf(rack)]]
      const host: Host = {
        index,
        rack,
        up: [own.up, ...above.flatMap((each) => each?.up ?? [])],
        down: [own.down, ...above.flatMap((each) => each?.down ?? [])],
        isStandard: standard.has(index),
        isAlive: true,
        fetches: [],
      }
      if (isSlow) this.#hit.add(host)
      const isSeed = !this.#scenario.from_server && index === 0
      for (const blob of this.#blobs) host.fetches.push(new Fetch(host, blob, world, isSeed))
      this.#hosts.push(host)
      if (!isSeed) this.#left += this.#blobs.length
    }
  }

  /** Indexes of a share of the hosts. */
  #share(share: number): Set<number> {
    const { hosts } = this.#scenario
    const chosen = new Set<number>()
    while (chosen.size < Math.round(share * hosts)) chosen.add(Math.floor(this.#random() * hosts))
    return chosen
  }

  /** What happens when. */
  #plan(): void {
    const { jitter, setup, late, churn, dead_gateways: gateways, slow_racks: slowRacks } = this.#scenario
    const lateHosts = this.#share(late?.share ?? 0)
    for (const host of this.#hosts) {
      const isLate = late !== undefined && lateHosts.has(host.index)
      const at = (isLate ? this.#ms(late.at) : 0) + this.#random() * jitter
      if (isLate) this.#hit.add(host)
      this.#planAt(at, () => {
        this.#beganMs.set(host, this.#nowMs)
      })
      this.#planAt(at + setup, () => {
        this.#start(host)
      })
    }
    if (churn) {
      for (const index of this.#share(churn.share)) {
        const host = this.#hosts[index]
        if (host === undefined || this.#isSeed(host)) continue
        this.#hit.add(host)
        const goes = this.#random() * this.#bounds.seconds * 1000
        this.#planAt(goes, () => {
          // Who comes late may not be there yet.
          if (!isRunning(host)) return
          this.#stop(host)
          this.#planAt(this.#nowMs + this.#ms(churn.away), () => {
            this.#start(host)
          })
        })
      }
    }
    if (gateways) {
      this.#planAt(this.#ms(gateways.at), () => {
        this.#killGateways(gateways.racks)
      })
    }
    if (slowRacks) {
      const racks = new Set<number>()
      while (racks.size < Math.round(slowRacks.share * this.#rackSizes.length))
        racks.add(Math.floor(this.#random() * this.#rackSizes.length))
      for (const host of this.#hosts) if (racks.has(host.rack)) this.#hit.add(host)
      const set = (factor: number) => {
        for (const rack of racks)
          for (const link of [this.#rackUp[rack], this.#rackDown[rack]])
            if (link !== undefined) this.#network.setCapacity(link, this.#scenario.rack_uplink * factor)
      }
      this.#planAt(this.#ms(slowRacks.at), () => {
        set(slowRacks.factor)
      })
      if (slowRacks.for !== undefined)
        this.#planAt(this.#ms(slowRacks.at) + this.#ms(slowRacks.for), () => {
          set(1)
        })
    }
    const { tracker_away: trackerAway, server_away: serverAway } = this.#scenario
    if (trackerAway) {
      this.#planAt(this.#ms(trackerAway.at), () => {
        this.#trackerAway = true
      })
      this.#planAt(this.#ms(trackerAway.at) + this.#ms(trackerAway.for), () => {
        this.#trackerAway = false
      })
    }
    if (serverAway) {
      const [link] = this.#serverUp
      const rate = link === undefined ? 0 : this.#network.capacityOf(link)
      const set = (away: boolean) => {
        this.#serverAway = away
        if (link !== undefined && !this.#isSeedGone) this.#network.setCapacity(link, away ? 0 : rate)
      }
      const backMs = this.#ms(serverAway.at) + this.#ms(serverAway.for)
      this.#planAt(this.#ms(serverAway.at), () => {
        set(true)
        for (const { fetches } of this.#hosts)
          for (const fetch of fetches) fetch.cutWebseed(backMs + webseedRetryMaxMs * this.#random())
      })
      this.#planAt(backMs, () => {
        // It has been started anew, and remembers no lease.
        this.#server.restart()
        set(false)
      })
    }
  }

  #planAt(atMs: number, act: () => void): void {
    this.#plannedUntilMs = Math.max(this.#plannedUntilMs, atMs)
    this.#agenda.at(atMs, act)
  }

  #ms(moment: Moment): number {
    return typeof moment === 'number' ? moment : moment.ofBound * this.#bounds.seconds * 1000
  }

  #isSeed(host: Host): boolean {
    return !this.#scenario.from_server && host.index === 0
  }

  #start(host: Host): void {
    if (this.#gone.has(host) || isRunning(host)) return
    host.isAlive = true
    for (const fetch of host.fetches) {
      fetch.start()
      if (!fetch.isComplete) this.#askGrant(fetch, undefined)
      this.#announce(fetch, 'started')
      const life = (this.#lives[fetch.number] ?? 0) + 1
      this.#lives[fetch.number] = life
      const firstMs = this.#nowMs + tickMs * (0.5 + this.#random() / 2)
      this.#tick(fetch, life, firstMs, this.#nowMs + webseedReviewMs)
    }
  }

  #stop(host: Host): void {
    host.isAlive = false
    for (const fetch of host.fetches) fetch.stop()
  }

  #tick(fetch: Fetch, life: number, atMs: number, reviewMs: number): void {
    this.#agenda.at(atMs, () => {
      if (!fetch.isRunning || (fetch.isComplete && !fetch.isOnlySeed)) return
      if (life !== this.#lives[fetch.number]) return
      fetch.tick()
      const stalledMs = this.#nowMs - fetch.movedAtMs
      let nextReviewMs = reviewMs
      if (Math.floor(stalledMs / stallMs) > Math.max(0, Math.floor((stalledMs - tickMs) / stallMs))) {
        this.#askGrant(fetch, stalledMs / 1000)
        this.#announce(fetch, undefined)
      } else if (this.#nowMs >= reviewMs && fetch.isFirst) {
        this.#askGrant(fetch, undefined)
        nextReviewMs = this.#nowMs + webseedReviewMs
      }
      this.#tick(fetch, life, atMs + tickMs, nextReviewMs)
    })
  }

  #askGrant(fetch: Fetch, stalledSeconds: number | undefined, rangeDone: number | false = false): void {
    if (!this.#scenario.from_server || this.#isSeedGone || this.#serverAway) return
    if (fetch.host.isStandard) {
      if (this.#isStandardOnly)
        fetch.setWebseed({ way: this.#serverUp, range: undefined, rangeDone: () => undefined })
      return
    }
    const range = this.#server.range({ number: fetch.number, stalledSeconds, rangeDone })
    let asked = false
    if (rangeDone !== false && range === undefined) return
    fetch.setWebseed(
      range && {
        way: this.#serverUp,
        range,
        rangeDone: () => {
          if (asked) return
          asked = true
          this.#agenda.at(this.#nowMs + grantMs, () => {
            this.#askGrant(fetch, undefined, range.firstPiece)
          })
        },
      },
    )
  }

  #announce(fetch: Fetch, event: AnnounceEvent | undefined): void {
    if (!fetch.isRunning) return
    const turn = (this.#announceTurns[fetch.number] ?? 0) + 1
    this.#announceTurns[fetch.number] = turn
    const again = (ms: number, event: AnnounceEvent | undefined) => {
      this.#agenda.at(this.#nowMs + ms, () => {
        if (turn === this.#announceTurns[fetch.number]) this.#announce(fetch, event)
      })
    }
    if (this.#trackerAway || this.#serverAway) {
      again(retryMs * (0.5 + this.#random()), event)
      return
    }
    const second = Math.floor(this.#nowMs / 1000)
    this.#announces[second] = (this.#announces[second] ?? 0) + 1
    const { number, downloaded, bytesLeft: left } = fetch
    const { peers, intervalSeconds } = this.#server.announce({ number, event, downloaded, left })
    fetch.heard(
      peers.flatMap(({ host: index, distance, reserve }) => {
        const host = this.#hosts[index]
        return host ? [{ host, distance, reserve }] : []
      }),
    )
    again(intervalSeconds * 1000 * (0.9 + this.#random() / 10), undefined)
  }

  #finished(fetch: Fetch): void {
    this.#left--
    this.#announce(fetch, 'completed')
  }

  #killSeed(): void {
    this.#isSeedGone = true
    if (this.#scenario.from_server) {
      for (const link of this.#serverUp) this.#network.setCapacity(link, 0)
      for (const { fetches } of this.#hosts) for (const fetch of fetches) fetch.cutWebseed(Infinity)
    } else {
      const [seed] = this.#hosts
      if (seed) this.#stop(seed)
    }
  }

  #killGateways(share: number): void {
    const racks = new Set<number>()
    for (const host of this.#hosts) {
      if (racks.has(host.rack) || !host.fetches.some((fetch) => fetch.isGateway && !fetch.isComplete))
        continue
      racks.add(host.rack)
      if (this.#random() >= share) continue
      this.#hit.add(host)
      this.#gone.add(host)
      this.#left -= host.fetches.filter((fetch) => !fetch.isComplete).length
      this.#stop(host)
    }
  }

  #originBytes(): number {
    const [server] = this.#serverUp
    if (this.#scenario.from_server) return server === undefined ? 0 : this.#network.sentOver(server)
    const up = this.#hosts[0]?.up[0]
    return up === undefined ? 0 : this.#network.sentOver(up)
  }

  #result(steps: number, wallSeconds: number): Result {
    const hosts = this.#hosts
      .filter((host) => !this.#isSeed(host))
      .map((host) => {
        const times = host.fetches.map(({ finishedMs }) => finishedMs)
        const lastMs = times.includes(undefined) ? undefined : Math.max(...times.map((ms) => ms ?? 0))
        return {
          index: host.index,
          rack: host.rack,
          seconds: lastMs === undefined ? undefined : lastMs / 1000,
          took: lastMs === undefined ? undefined : (lastMs - (this.#beganMs.get(host) ?? 0)) / 1000,
          isHit: this.#hit.has(host),
          isGone: this.#gone.has(host),
        }
      })
    const seeded = this.#scenario.from_server ? 0 : 1
    return {
      scenario: this.#scenario,
      pieces: this.#blobs[0]?.pieceCount ?? 0,
      rackSizes: this.#rackSizes,
      bounds: this.#bounds,
      hosts,
      crossRackBytes: this.#rackDown.reduce((sum, link) => sum + this.#network.sentOver(link), 0),
      crossRackMin: (this.#rackSizes.length - seeded) * this.#totalBytes(),
      originBytes: this.#originBytes(),
      announces: this.#announces.reduce((sum, count) => sum + count, 0),
      announcesPerSecondMax: this.#announces.reduce((most, count) => Math.max(most, count), 0),
      simulatedSeconds: this.#nowMs / 1000,
      steps,
      wallSeconds,
    }
  }
}

/** What the build takes over the slowest of all links. */
function slowestSeconds(scenario: Scenario): number {
  const {
    size,
    releases,
    host_uplink: host,
    rack_uplink: rack,
    row_uplink: row,
    server_uplink: server,
  } = scenario
  const slowest = Math.min(
    host * Math.min(1, scenario.slow?.factor ?? 1),
    rack * Math.min(1, scenario.slow_racks?.factor ?? 1),
    row ?? Infinity,
    server ?? Infinity,
  )
  return (size * releases) / slowest
}

function isRunning({ fetches }: Host): boolean {
  return fetches.some((fetch) => fetch.isRunning)
}

function isDone({ fetches }: Host): boolean {
  return fetches.every(({ isComplete }) => isComplete)
}

import { createHash } from 'node:crypto'
import { toEnginePeers } from '../agent/announcer.ts'
import type { PieceRange } from '../agent/engine/engine.ts'
import { endpointIp, formatIp, parseIp } from '../lib/protocol/address.ts'
import type { AnnounceEvent } from '../lib/protocol/announce.ts'
import { parseAnnounceReply, writeAnnounce } from '../lib/protocol/announce.ts'
import { infoHashFromHex } from '../lib/protocol/infohash.ts'
import { parsePlace } from '../lib/protocol/place.ts'
import { silentLog } from '../lib/runtime/log.ts'
import { ServerConfig } from '../server/config.ts'
import type { WebseedPolicy } from '../server/registry/webseed-policy.ts'
import { createWebseedPolicy } from '../server/registry/webseed-policy.ts'
import { openMemoryPeerStore } from '../server/tracker/memory/memory-peer-store.ts'
import { samplePeersMax } from '../server/tracker/peer-store.ts'
import { createTopology } from '../server/tracker/topology.ts'
import { createTracker } from '../server/tracker/tracker.ts'
import { trackerConfigOf } from '../server/tracker-settings.ts'
import type { Scenario } from './scenario.ts'
import type { Blob, Host } from './world.ts'

/** What a fetch tells the tracker. */
export interface Announce {
  /** Of the fetch. */
  readonly number: number
  readonly event: AnnounceEvent | undefined
  readonly downloaded: number
  readonly left: number
}

/** What the tracker answers. */
export interface Peers {
  /** Hosts by their index. */
  readonly peers: readonly { readonly host: number; readonly distance: number; readonly reserve: boolean }[]
  readonly intervalSeconds: number
}

/** A fetch asks whether it may use the webseed. */
export interface RangeAsk {
  readonly number: number
  readonly stalledSeconds: number | undefined
  /** The first piece of the range that it has done. */
  readonly rangeDone: number | false
}

/** The server of a fleet: the tracker with its store, and the policy of the webseed. */
export interface Server {
  announce(announce: Announce): Peers
  /** A range of pieces that a fetch may get from the server. */
  range(ask: RangeAsk): PieceRange | undefined
  /** It remembers no lease. */
  restart(): void
}

/** @param fleet by index; fetches are numbered by host, then by build */
export function createServer(
  scenario: Scenario,
  fleet: {
    readonly hosts: readonly Host[]
    readonly blobs: readonly Blob[]
    readonly rows: readonly number[]
  },
  { now, random }: { readonly now: () => number; readonly random: () => number },
): Server {
  const { hosts, blobs, rows } = fleet
  const infoHashes = blobs.map(({ index }) =>
    infoHashFromHex(createHash('sha1').update(`${scenario.seed} ${index}`).digest('hex')),
  )
  const byAddress = new Map(hosts.map((host) => [addressOf(host.index), host]))
  const config = ServerConfig.parse({})
  const levels = scenario.rows === undefined ? ['rack'] : ['rack', 'row']
  const store = openMemoryPeerStore(
    {
      buffers: new Map(),
      peersMax: 2 * scenario.hosts * scenario.releases + 1000,
      swarmsMax: 100,
      levels: levels.length,
      seed: scenario.seed,
    },
    { random, now, sampleMax: samplePeersMax },
  )
  const places =
    scenario.rows === undefined
      ? {}
      : Object.fromEntries(rows.map((row, rack) => [`rack-${rack}`, { parents: [`row-${row}`] }]))
  const tracker = createTracker({
    store,
    rules: {
      topology: createTopology({ levels, places, prefixes: [], ipv4PrefixLength: 24, ipv6PrefixLength: 64 }),
      hooks: [
        {
          name: 'place',
          announce: (request) => {
            const host = byAddress.get(formatIp(request.source))
            request.place = host && parsePlace(`rack-${host.rack}`)
          },
        },
      ],
      config: trackerConfigOf(config),
    },
    after: undefined,
    epoch: 'simulated',
    now,
    observer: { handled: () => undefined, refused: () => undefined },
    log: silentLog(),
  })
  const { webseed } = config.registry
  const newPolicy = (): WebseedPolicy =>
    createWebseedPolicy({ leaseMs: webseed.lease, hostsMax: webseed.replies_max, now })
  let policy = newPolicy()

  function fetchOf(number: number) {
    const host = hosts[Math.floor(number / blobs.length)]
    const blob = blobs[number % blobs.length]
    const infoHash = infoHashes[number % blobs.length]
    if (!host || !blob || !infoHash) throw new Error(`There is no fetch ${number}`)
    return { host, blob, infoHash }
  }

  return {
    announce({ number, event, downloaded, left }) {
      const { host, infoHash } = fetchOf(number)
      const query = writeAnnounce({
        infoHash,
        peerId: Buffer.from(`-RS0200-${String(host.index).padStart(12, '0')}`),
        port: 6881,
        uploaded: 0,
        downloaded,
        left,
        event,
        numwant: left === 0 ? 0 : undefined,
        rackswarm: !host.isStandard,
      })
      const source = parseIp(addressOf(host.index))
      const bytes = source && tracker.announce(query, source)
      if (bytes === undefined || bytes instanceof Promise)
        throw new Error('The tracker did not answer at once')
      const reply = parseAnnounceReply(bytes)
      const peers = toEnginePeers(reply).flatMap(({ endpoint, distance, reserve }) => {
        const peer = byAddress.get(formatIp(endpointIp(endpoint)))
        if (peer === undefined) return []
        return [
          {
            host: peer.index,
            distance: host.isStandard ? 0 : distance,
            reserve: reserve && !host.isStandard,
          },
        ]
      })
      return { peers, intervalSeconds: reply.intervalSeconds }
    },
    range({ number, stalledSeconds, rangeDone }) {
      const { host, blob, infoHash } = fetchOf(number)
      return policy.mayUse({
        infoHash,
        pieceCount: blob.pieceCount,
        host: String(host.index),
        counts: store.scrape(infoHash),
        stalledSeconds,
        rangeDone,
      })
    },
    restart() {
      policy = newPolicy()
    },
  }
}

function addressOf(index: number): string {
  return `10.${(index >> 16) & 255}.${(index >> 8) & 255}.${index & 255}`
}

import { parseIp } from '../lib/protocol/address.ts'
import { writeAnnounce } from '../lib/protocol/announce.ts'
import { infoHashFromHex } from '../lib/protocol/infohash.ts'
import { silentLog } from '../lib/runtime/log.ts'
import { ServerConfig } from '../server/config.ts'
import { openMemoryPeerStore } from '../server/tracker/memory/memory-peer-store.ts'
import { samplePeersMax } from '../server/tracker/peer-store.ts'
import { createTopology } from '../server/tracker/topology.ts'
import { createTracker } from '../server/tracker/tracker.ts'
import { trackerConfigOf } from '../server/tracker-settings.ts'
import type { Benchmark, Side } from './harness.ts'

const racks = 250
const hostsPerRack = 40
const rounds = 30
const length = 1_500_000_000

/** What it costs to choose peers by rack, against drawing them at random. */
export const selection: Benchmark = {
  name: 'selection',
  summary: `announces of a swarm of ${racks * hostsPerRack} hosts, half of them seeders, answered in process: no sockets`,
  figures: [{ name: 'announces', unit: '/s' }],
  ignoresSize: true,
  prepare: () =>
    Promise.resolve([
      sideOf('racks', `${racks} racks of ${hostsPerRack}, by the /24 of the address`, ['rack'], 24),
      sideOf('racks in rows', `the same, in rows by the /20`, ['rack', 'row'], 24),
      sideOf('random', 'the same hosts in one rack: peers are drawn at random', ['rack'], 0),
    ]),
}

function sideOf(name: string, settings: string, levels: string[], ipv4PrefixLength: number): Side {
  return {
    name,
    settings: `${settings}; replies of 50 peers with distances, ${rounds} rounds of announces`,
    run: () => Promise.resolve({ announces: announcesPerSecond(levels, ipv4PrefixLength) }),
  }
}

function announcesPerSecond(levels: readonly string[], ipv4PrefixLength: number): number {
  const store = openMemoryPeerStore(
    { buffers: new Map(), peersMax: 20_000, swarmsMax: 10, levels: levels.length, seed: 1 },
    { random: Math.random, now: Date.now, sampleMax: samplePeersMax },
  )
  const tracker = createTracker({
    store,
    rules: {
      topology: createTopology({
        levels,
        places: rowsOf(levels.length > 1),
        prefixes: [],
        ipv4PrefixLength,
        ipv6PrefixLength: 64,
      }),
      hooks: [],
      config: trackerConfigOf(ServerConfig.parse({})),
    },
    after: undefined,
    epoch: 'bench',
    now: Date.now,
    observer: { handled: () => undefined, refused: () => undefined },
    log: silentLog(),
  })
  const infoHash = infoHashFromHex('01'.repeat(20))
  const asks = Array.from({ length: racks * hostsPerRack }, (_, host) => {
    const source = parseIp(`10.0.${Math.floor(host / hostsPerRack)}.${1 + (host % hostsPerRack)}`)
    if (source === undefined) throw new Error('that is no address')
    const ask = (event?: 'started') =>
      writeAnnounce({
        infoHash,
        peerId: Buffer.from(`-RS0200-${String(host).padStart(12, '0')}`),
        port: 6881,
        uploaded: 0,
        downloaded: 0,
        left: host % 2 === 0 ? length : 0,
        event,
        rackswarm: true,
      })
    return { source, started: ask('started'), again: ask() }
  })
  for (const { source, started } of asks) void tracker.announce(started, source)
  const fromMs = performance.now()
  for (let round = 0; round < rounds; round++)
    for (const { source, again } of asks)
      if (tracker.announce(again, source) instanceof Promise)
        throw new Error('the tracker did not answer at once')
  return (1000 * rounds * asks.length) / (performance.now() - fromMs)
}

/** Racks are known by their addresses. */
function rowsOf(hasRows: boolean): Record<string, { parents: string[] }> {
  if (!hasRows) return {}
  return Object.fromEntries(
    Array.from({ length: racks }, (_, rack) => [
      `10.0.${rack}.0/24`,
      { parents: [`row-${Math.floor(rack / 16)}`] },
    ]),
  )
}

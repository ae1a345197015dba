import { join } from 'node:path'
import type { Scenario } from '../../simulator/scenario.ts'
import type { ToolPackage } from '../../test/support/tools.ts'

export type ClientKind = 'agent' | 'aria2' | 'libtorrent'

/** One way of bringing the build to the hosts of the same network. */
export interface SwarmSide {
  readonly name: string
  /** Versions, flags, what it stands for. */
  readonly settings: string
  /** Besides what the network is made of. */
  readonly needs?: ToolPackage
  /** Multicast knows no server, tracker or faults. */
  readonly isMulticast?: true
  /** What the scenario is with this side: the share of other clients. */
  readonly scenario?: Readonly<Record<string, unknown>>
  /** Every host runs this in the place of our agent. */
  readonly everyHost?: ClientKind
  /** YAML for the top level of server.yaml. */
  readonly server?: (scenario: Scenario) => string
  /** The simulator can say what to expect. */
  readonly isSimulated: boolean
}

export const sides: readonly SwarmSide[] = [
  {
    name: 'rackswarm',
    settings: 'rackswarm-server and rackswarm-agent as they ship, racks by the /24 of the addresses',
    isSimulated: true,
  },
  {
    name: 'random',
    settings:
      'the same, with topology.ipv4_prefix_length: 0: all hosts are one rack, and peers are drawn at random',
    server: () => 'topology: { ipv4_prefix_length: 0 }\n',
    isSimulated: false,
  },
  {
    name: 'greedy',
    settings:
      'the same, with a hook that does as chihaya did: peers of the own subnet until the reply is full (at one less than a rack has hosts), without distances',
    server: ({ hosts, racks }) =>
      `prehooks:\n  - { name: ${join(import.meta.dirname, 'greedy.ts')}, options: { peersMax: ${Math.max(1, Math.ceil(hosts / racks) - 1)} } }\n`,
    isSimulated: false,
  },
  {
    name: 'aria2-half',
    settings:
      'every second host, at random, runs aria2 with a .torrent of `deployctl torrent --no-webseed`; agents with peers: any',
    needs: 'aria2',
    scenario: { standard_clients: 0.5 },
    isSimulated: true,
  },
  {
    name: 'libtorrent',
    settings:
      'every host runs libtorrent with a .torrent of `deployctl torrent`, the server as webseed; no SHA-256',
    needs: 'python3-libtorrent',
    everyHost: 'libtorrent',
    isSimulated: false,
  },
  {
    name: 'udpcast',
    settings:
      'udp-sender at the server, udp-receiver at every host, at nine tenths of the slowest link; no SHA-256',
    needs: 'udpcast',
    isMulticast: true,
    isSimulated: false,
  },
]

// Racks on one machine: a core switch, a switch for each rack behind its own uplink, a namespace for each host. Needs root, and Debian's
// iproute2 and ethtool. The namespace of the machine itself has no part in it, so its addresses meet no others.
import { spawn } from 'node:child_process'
import { readdir, readFile, writeFile } from 'node:fs/promises'
import { text } from 'node:stream/consumers'

/** A host, or the server. */
export interface Station {
  readonly namespace: string
  readonly address: string
}

export interface HostStation extends Station {
  readonly index: number
  readonly rack: number
  /** Of its rack's switch. */
  readonly port: string
}

/** Bytes that interfaces have carried since they were made, headers included. */
export interface Counters {
  readonly fromServer: number
  readonly intoRacks: readonly number[]
  readonly outOfRacks: readonly number[]
  readonly intoHosts: readonly number[]
  readonly outOfHosts: readonly number[]
}

export interface SwarmNetwork extends AsyncDisposable {
  /** Joined to the core, in no rack. */
  readonly server: Station
  readonly hosts: readonly HostStation[]
  /** Bytes a second, in both directions. */
  setHostRate(host: HostStation, rate: number): Promise<void>
  setRackRate(rack: number, rate: number): Promise<void>
  readCounters(): Promise<Counters>
  /** `fromServer` of them alone. */
  readServerBytes(): Promise<number>
}

export interface NetworkPlan {
  /** Hosts of each rack. */
  readonly rackSizes: readonly number[]
  /** Bytes a second, in each direction. */
  readonly hostRate: number
  readonly rackRate: number
  readonly serverRate: number
  readonly links: LinkShape
}

/** What all links have in common. */
export interface LinkShape {
  readonly mtu: number
  /**
   * What a queue holds before it drops. Bytes, as a port of a switch has them, and not time at so low a rate: where tens of senders meet, each with
   * the two packets that TCP has under way at least, a short queue would drop them again and again.
   */
  readonly queueBytes: number
}

/** What may leave at once, in time at its rate: a timer that comes a little late then costs nothing. */
const burstMs = 4
const burstMin = 16_000
const prefix = 'rackswarm-'
/** Namespaces that are set up at once. */
const atOnce = 8

/** Builds it all, or nothing. Disposing it kills what still runs in it. */
export async function startSwarmNetwork(plan: NetworkPlan): Promise<SwarmNetwork> {
  const own = `${prefix}${process.pid}-`
  const core = `${own}core`
  const racks = plan.rackSizes.map((_, rack) => rack)
  const switchOf = (rack: number) => `${own}rack${rack + 1}`
  const server: Station = { namespace: `${own}server`, address: '10.77.0.1' }
  const hosts = plan.rackSizes
    .flatMap((size, rack) =>
      Array.from({ length: size }, (_, i) => ({
        namespace: `${own}rack${rack + 1}-host${i + 1}`,
        address: `10.77.${rack + 1}.${i + 1}`,
        rack,
        port: `host${i + 1}`,
      })),
    )
    .map((host, index) => ({ ...host, index }))
  const stations = [server, ...hosts]
  const { links, hostRate, rackRate, serverRate } = plan

  await using undo = new AsyncDisposableStack()
  undo.defer(await allowCubic())
  undo.defer(() => removeNamespaces(own))
  const all = [core, ...racks.map(switchOf), ...stations.map(({ namespace }) => namespace)]
  await run('ip', ['-batch', '-'], all.map((each) => `netns add ${each}\n`).join(''))
  await within(core, [
    ...bridge,
    ...cable('server', server),
    ...port('server', links, serverRate),
    ...racks.flatMap((rack) => [
      `ip link add name rack${rack + 1} type veth peer name uplink netns ${switchOf(rack)}`,
      ...port(`rack${rack + 1}`, links, rackRate),
    ]),
  ])
  await eachOf(racks, (rack) =>
    within(switchOf(rack), [
      ...bridge,
      ...port('uplink', links, rackRate),
      ...hosts
        .filter((host) => host.rack === rack)
        .flatMap((host) => [...cable(host.port, host), ...port(host.port, links, hostRate)]),
    ]),
  )
  await eachOf(stations, (station) =>
    within(station.namespace, [
      'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6',
      'ip link set lo up',
      // What most fleets run. BBR, which some kernels come with, paces by what it measures, and measures little in bursts of single pieces.
      'echo cubic > /proc/sys/net/ipv4/tcp_congestion_control',
      `ip address add ${station.address}/16 brd + dev eth0`,
      ...link('eth0', links, station === server ? serverRate : hostRate),
      'ip route add 224.0.0.0/4 dev eth0',
      // Learnt neighbours of all namespaces share one table, which so many would fill.
      'ip -batch - <<END',
      ...stations
        .filter((other) => other !== station)
        .map(({ address }) => `neighbour add ${address} lladdr ${macOf(address)} dev eth0 nud permanent`),
      'END',
    ]),
  )

  const owned = undo.move()
  return {
    server,
    hosts,
    setHostRate: async (host, rate) => {
      await within(host.namespace, [shape('eth0', links, rate)])
      await within(switchOf(host.rack), [shape(host.port, links, rate)])
    },
    setRackRate: async (rack, rate) => {
      await within(switchOf(rack), [shape('uplink', links, rate)])
      await within(core, [shape(`rack${rack + 1}`, links, rate)])
    },
    readCounters: async () => {
      const ofCore = await readLinks(core)
      const ofRacks = await Promise.all(racks.map((rack) => readLinks(switchOf(rack))))
      const ofHosts = hosts.map((host) => ofRacks[host.rack]?.get(host.port))
      const uplinks = racks.map((rack) => ofCore.get(`rack${rack + 1}`))
      return {
        fromServer: ofCore.get('server')?.received ?? 0,
        intoRacks: uplinks.map((each) => each?.sent ?? 0),
        outOfRacks: uplinks.map((each) => each?.received ?? 0),
        intoHosts: ofHosts.map((each) => each?.sent ?? 0),
        outOfHosts: ofHosts.map((each) => each?.received ?? 0),
      }
    },
    readServerBytes: async () => (await readLinks(core, 'server')).get('server')?.received ?? 0,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  }
}

/** Removes what a run that was killed has left behind. */
export async function removeLeftNetworks(): Promise<void> {
  const owners = (await namespaces(prefix)).map((name) => /^rackswarm-(\d+)-/.exec(name)?.[1] ?? '')
  for (const pid of new Set(owners))
    if (pid !== '' && !isAlive(Number(pid))) await removeNamespaces(`${prefix}${pid}-`)
}

async function removeNamespaces(start: string): Promise<void> {
  await eachOf(await namespaces(start), async (name) => {
    const pids = await run('ip', ['netns', 'pids', name]).catch(() => '')
    for (const pid of pids.split('\n').filter((line) => line !== '')) kill(Number(pid))
    await run('ip', ['netns', 'delete', name])
  })
}

async function namespaces(start: string): Promise<string[]> {
  // The directory is made with the first namespace.
  const names = await readdir('/run/netns').catch(() => [])
  return names.filter((name) => name.startsWith(start))
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It has ended by itself.
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}

const bridge = [
  'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6',
  // Where the kernel would show bridged packets to iptables.
  'for each in iptables ip6tables arptables; do echo 0 > /proc/sys/net/bridge/bridge-nf-call-$each; done 2>/dev/null || true',
  // Nobody asks for groups: what is sent to one goes to every port.
  'ip link add name switch type bridge mcast_snooping 0',
  'ip link set switch up',
]

/** Namespaces may only use what this machine allows everybody. @returns what takes it back */
async function allowCubic(): Promise<() => Promise<void>> {
  const file = '/proc/sys/net/ipv4/tcp_allowed_congestion_control'
  const before = (await readFile(file, 'utf8')).trim()
  await writeFile(file, `${before} cubic`)
  return () => writeFile(file, before)
}

function cable(name: string, { namespace, address }: Station): string[] {
  return [`ip link add name ${name} type veth peer name eth0 address ${macOf(address)} netns ${namespace}`]
}

function port(name: string, links: LinkShape, rate: number): string[] {
  return [`ip link set ${name} master switch`, ...link(name, links, rate)]
}

/** Packets as on a wire, one by one, and no faster than the rate. */
function link(name: string, links: LinkShape, rate: number): string[] {
  return [
    `ethtool -K ${name} tx off tso off gso off gro off >/dev/null`,
    `ip link set ${name} mtu ${links.mtu} up`,
    shape(name, links, rate),
  ]
}

function shape(name: string, { queueBytes }: LinkShape, rate: number): string {
  const burst = Math.round(Math.max(burstMin, (rate * burstMs) / 1000))
  return `tc qdisc replace dev ${name} root tbf rate ${Math.round(rate * 8)}bit burst ${burst} limit ${queueBytes}`
}

function macOf(address: string): string {
  return ['02', '00', ...address.split('.').map((byte) => Number(byte).toString(16).padStart(2, '0'))].join(
    ':',
  )
}

async function readLinks(
  namespace: string,
  ...only: string[]
): Promise<Map<string, { sent: number; received: number }>> {
  const links = JSON.parse(await run('ip', ['-n', namespace, '-j', '-s', 'link', 'show', ...only])) as {
    ifname: string
    stats64: { rx: { bytes: number }; tx: { bytes: number } }
  }[]
  return new Map(
    links.map(({ ifname, stats64: { rx, tx } }) => [ifname, { sent: tx.bytes, received: rx.bytes }]),
  )
}

async function within(namespace: string, commands: readonly string[]): Promise<void> {
  await run('ip', ['netns', 'exec', namespace, 'sh', '-e', '-s'], `${commands.join('\n')}\n`)
}

async function eachOf<Item>(items: readonly Item[], act: (item: Item) => Promise<void>): Promise<void> {
  const queue = items.values()
  const worker = async () => {
    for (const item of queue) await act(item)
  }
  await Promise.all(Array.from({ length: atOnce }, worker))
}

async function run(command: string, args: readonly string[], input = ''): Promise<string> {
  const child = spawn(command, args, { stdio: 'pipe' })
  const ended = new Promise<number | null>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', resolve)
  })
  child.stdin.on('error', () => undefined).end(input)
  const [stdout, stderr, code] = await Promise.all([text(child.stdout), text(child.stderr), ended])
  if (code !== 0)
    throw new Error(`${command} ${args.join(' ')} ended with code ${String(code)}: ${stderr.trim()}`)
  return stdout
}

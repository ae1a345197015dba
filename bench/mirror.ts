import { execFile } from 'node:child_process'
import { mkdir, mkdtemp, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { startContainerd } from '../test/support/containerd.ts'
import type { FleetServer } from '../test/support/fleet.ts'
import { bin, removeAll, startFleetServer } from '../test/support/fleet.ts'
import { writeIndexImage } from '../test/support/image.ts'
import { pushImage, untilSeeders } from '../test/support/mirror.ts'
import type { Namespace } from '../test/support/namespaces.ts'
import { startNetwork } from '../test/support/namespaces.ts'
import { installTools } from '../test/support/tools.ts'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { cpuSecondsOf } from './harness.ts'
import { startSwarmAgent } from './swarm/fleet.ts'

const run = promisify(execFile)
const mebibyte = 2 ** 20

/** What a container runtime waits for an image: from the registry, and through the agents' mirrors. */
export const mirror: Benchmark = {
  name: 'mirror',
  summary:
    'containerd pulls an image from the registry, through the mirror of a first host, and of a second one of its rack; root on Linux',
  figures: [
    { name: 'from the registry', unit: 's' },
    { name: 'first host', unit: 's' },
    { name: 'first ÷ registry', unit: '×' },
    { name: 'second host', unit: 's' },
    { name: 'link ÷ second', unit: '×' },
    { name: 'agent CPU of the first', unit: 's' },
    { name: 'server CPU of the first', unit: 's' },
    { name: 'server CPU of the pull from it', unit: 's' },
  ],
  unwarmed: true,
  prepare,
}

/** Of the server's uplink, in Mb/s; undefined: as fast as the machine is. */
const links = [200, 1000, undefined] as const
const warmingBytes = 64 * mebibyte

async function prepare(
  _stack: AsyncDisposableStack,
  { sizeBytes, directory }: BenchOptions,
): Promise<Side[]> {
  if (process.platform !== 'linux' || process.getuid?.() !== 0)
    throw new Error('`npm run bench -- mirror` needs root on Linux: it makes network namespaces')
  installTools(['iproute2', 'containerd', 'skopeo'])
  await Promise.resolve()
  return links.map((link) => ({
    name: link === undefined ? 'no cap' : `${link} Mb/s`,
    settings: `server on a bridge, ${link === undefined ? 'not capped' : `what it sends capped at ${link} Mb/s by tc tbf`}; two hosts of a rack in network namespaces, each with an agent and a containerd of Debian of its own; one layer of random bytes, new each run; all started anew for each run and warmed with an image of 64 MiB; \`ctr content fetch\` with an empty content store each time; the second host’s agent has nothing from the server but configurations and manifests`,
    run: () => measure(link, { sizeBytes, directory }),
  }))
}

interface Host {
  readonly namespace: Namespace
  readonly pid: number
  readonly hostsDirectory: string
  received(source: string): Promise<number>
}

async function measure(
  linkMbps: number | undefined,
  { sizeBytes, directory: home }: BenchOptions,
): Promise<Record<string, number>> {
  const directory = await mkdtemp(join(home, 'mirror-'))
  await using stack = new AsyncDisposableStack()
  stack.defer(() => removeAll(directory))
  const owner = { after: (undo: () => PromiseLike<void> | void) => stack.defer(async () => undo()) }
  const { bridge, addNamespaces } = await startNetwork(owner)
  const namespaces = await addNamespaces(owner, 2)
  const server = stack.use(
    await startFleetServer(join(directory, 'server'), {
      http: `addr: "${bridge.ipv4}:0", insecure_plaintext: true`,
      settings: 'min_announce_interval: 1s\n',
    }),
  )
  const hosts: Host[] = []
  for (const [index, namespace] of namespaces.entries())
    hosts.push(await startHost(stack, join(directory, `host-${index}`), server, namespace, index))
  const [one, two] = hosts
  if (!one || !two) throw new Error('two hosts are needed')
  const direct = await writeDirectHosts(join(directory, 'direct'), server)
  const login = `token:${(await readFile(server.adminTokenFile, 'utf8')).trim()}`

  const push = async (name: string, bytes: number): Promise<string> => {
    const layout = join(directory, name)
    await writeIndexImage(layout, [{ architecture: 'amd64', layerBytes: bytes }])
    const reference = await pushImage(server, layout, `bench/${name}`)
    await removeAll(layout)
    return reference
  }
  let pulls = 0
  const pull = async (
    reference: string,
    { namespace, hostsDirectory }: Pick<Host, 'namespace' | 'hostsDirectory'>,
    user?: string,
  ) => {
    const own = join(directory, `containerd-${++pulls}`)
    await using client = await startContainerd(own, { namespace: namespace.name })
    const startedAt = performance.now()
    await client.fetch(reference, { hostsDirectory, ...(user === undefined ? {} : { user }) })
    const seconds = (performance.now() - startedAt) / 1000
    await client[Symbol.asyncDispose]()
    await removeAll(own)
    return seconds
  }
  const fromRegistry = { namespace: one.namespace, hostsDirectory: direct }

  const warming = await push('warming', warmingBytes)
  await pull(warming, fromRegistry, login)
  await pull(warming, one)
  await untilSeeders(server, 1)
  await pull(warming, two)
  await untilSeeders(server, 2)

  const reference = await push('image', sizeBytes)
  if (linkMbps !== undefined)
    await run('tc', [
      ...['qdisc', 'replace', 'dev', bridge.name, 'root', 'tbf', 'rate', `${linkMbps}mbit`],
      ...['burst', '256k', 'latency', '50ms'],
    ])
  const straight = await cpuSecondsOf({ server: server.pid }, () => pull(reference, fromRegistry, login))
  const first = await cpuSecondsOf({ server: server.pid, agent: one.pid }, () => pull(reference, one))
  await untilSeeders(server, 3)
  const before = await two.received('webseed')
  const secondSeconds = await pull(reference, two)
  const webseed = (await two.received('webseed')) - before
  if (webseed > 0) throw new Error(`Cannot use the run: the second host has ${webseed} bytes from the server`)
  return {
    'from the registry': straight.result,
    'first host': first.result,
    'first ÷ registry': first.result / straight.result,
    'second host': secondSeconds,
    'link ÷ second': linkMbps === undefined ? Number.NaN : (sizeBytes * 8) / (linkMbps * 1e6) / secondSeconds,
    'agent CPU of the first': first.cpu['agent'] ?? Number.NaN,
    'server CPU of the first': first.cpu['server'] ?? Number.NaN,
    'server CPU of the pull from it': straight.cpu['server'] ?? Number.NaN,
  }
}

/** An agent with a mirror that answers for tags too, and what its containerd needs. */
async function startHost(
  stack: AsyncDisposableStack,
  directory: string,
  server: FleetServer,
  namespace: Namespace,
  index: number,
): Promise<Host> {
  const { ipv4: address } = namespace
  const metrics = `${address}:6882`
  const agent = stack.use(
    await startSwarmAgent(
      { namespace: namespace.name, address, index, rack: 0, port: '' },
      directory,
      { url: server.publicUrl, bootstrapTokenFile: join(server.dataDirectory, 'bootstrap-token') },
      {
        follow: [],
        settings: `place: rack-1\nmetrics_addr: ${metrics}\nmirror: { enabled: true }\ndisk: { quota: 100GiB }\n`,
        logged: () => undefined,
      },
    ),
  )
  const root = join(directory, 'root')
  await run(process.execPath, [
    bin('rackswarm-agent'),
    ...['mirror', 'install', '--for', 'containerd', '--resolve', '--root', root],
    ...['--config', join(directory, 'agent.yaml')],
  ])
  return {
    namespace,
    pid: agent.pid,
    hostsDirectory: join(root, 'etc/containerd/certs.d'),
    received: async (source) => {
      const text = await (await fetch(`http://${metrics}/metrics`)).text()
      const name = `rackswarm_agent_received_bytes_total{source="${source}"}`
      const line = text.split('\n').find((found) => found.startsWith(`${name} `))
      return Number(line?.slice(name.length + 1) ?? 0)
    },
  }
}

/** Without it containerd takes every registry beyond loopback to speak TLS. @returns the directory of hosts.toml files */
async function writeDirectHosts(directory: string, server: FleetServer): Promise<string> {
  const { host } = new URL(server.publicUrl)
  await mkdir(join(directory, host), { recursive: true })
  await writeFile(
    join(directory, host, 'hosts.toml'),
    `server = "${server.publicUrl}"\n\n[host."${server.publicUrl}"]\n  capabilities = ["pull", "resolve"]\n`,
  )
  return directory
}

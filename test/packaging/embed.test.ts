// The package as somebody else's program has it: installed from its tarball, with the example package beside it.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cp, mkdir, readFile, readdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { before, test } from 'node:test'
import { pathToFileURL } from 'node:url'
import { createUdpTracker } from '../../lib/client/udp-tracker.ts'
import { parseAnnounceReply } from '../../lib/protocol/announce.ts'
import { formatEndpoint } from '../../lib/protocol/address.ts'
import { infoHashToHex } from '../../lib/protocol/infohash.ts'
import { startChild } from '../../lib/runtime/child.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import type { CreatePeerStore } from '../../server/embed.ts'
import { announceOf, peerStoreContract } from '../server/tracker/peer-store.contract.ts'
import { installTarball, packTarball, root, run } from '../support/package.ts'
import type { Address } from '../support/tracker.ts'
import {
  announceFields,
  announceQuery,
  failure,
  fileOwner,
  first,
  httpGet,
  temporaryDirectory,
  testHash,
} from '../support/tracker.ts'
import { until } from '../support/until.ts'

const owner = fileOwner()
/** Where the example is installed. */
let home = ''

before(async () => {
  const directory = await temporaryDirectory(owner)
  home = join(directory, 'tracker-plugins')
  await cp(join(root, 'examples', 'tracker-plugins'), home, { recursive: true })
  await installTarball(await packTarball(directory), home)
})

interface Addresses {
  readonly http: readonly Address[]
  readonly udp: readonly Address[]
}

test('the tarball brings all that the example needs', async () => {
  const installed = (await readdir(join(home, 'node_modules'))).filter((name) => !name.startsWith('.'))
  assert.deepEqual(installed, ['rackswarm'])
})

test('embed.js: its tracker answers over HTTP and UDP, by the rules of its hooks', async (t) => {
  const child = spawn(process.execPath, ['embed.js', 'embedded.jsonl'], {
    cwd: home,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  t.after(() => child.kill('SIGKILL'))
  let errors = ''
  child.stderr.on('data', (chunk: Buffer) => (errors += chunk.toString()))
  const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string]
  await hookAndPostHookAct(JSON.parse(line) as Addresses, join(home, 'embedded.jsonl'))
  child.kill('SIGTERM')
  assert.deepEqual(await once(child, 'exit'), [0, null], 'it ends by itself once the tracker has')
  assert.equal(errors, '')
})

test('server.yaml: rackswarm-server takes the same hooks and store by the paths of their modules', async (t) => {
  const config = await readFile(join(home, 'server.yaml'), 'utf8')
  const file = join(home, 'server-on-free-ports.yaml')
  const data = await temporaryDirectory(t)
  const changed = config
    .replace('addr: 127.0.0.1:6969', 'addr: 127.0.0.1:0')
    .replace('data_dir: ./data', `data_dir: ${data}`)
    .replace('./completions.jsonl', join(data, 'completions.jsonl'))
  assert.equal([...changed.matchAll(/6969|\.\/data|\.\/completions/g)].length, 0, 'all three are replaced')
  await writeFile(file, changed)
  const server = await startChild({
    file: join(home, 'node_modules', 'rackswarm', 'bin', 'rackswarm-server.js'),
    args: ['--config', file],
    readyMessage: 'server is listening',
    logFile: join(data, 'server.log'),
  })
  t.after(() => server[Symbol.asyncDispose]())
  const addresses = { http: server.ready['tracker'], udp: server.ready['udp'] } as Addresses
  await hookAndPostHookAct(addresses, join(data, 'completions.jsonl'))
  // The memory store would have left a snapshot.
  await server[Symbol.asyncDispose]()
  assert.equal(await server.exited, 0)
  assert.ok(!(await readdir(data)).includes('swarms.snapshot'))
})

/** Announces as hosts 127.0.0.8, 9 and 10 would, and looks what the hooks of the example make of it. */
async function hookAndPostHookAct({ http, udp }: Addresses, file: string): Promise<void> {
  const announce = async (from: string, over: Parameters<typeof announceQuery>[0] = {}) =>
    (await httpGet(first(http), `/announce?${announceQuery(over)}`, { from })).body
  const { host, port } = first(udp)
  const udpTracker = (from: string) => createUdpTracker({ url: `udp://${host}:${port}`, localAddress: from })
  assert.equal(await announce('127.0.0.8', { port: 80 }), failure('port 80 is below 1024'))
  await using eight = udpTracker('127.0.0.8')
  await assert.rejects(eight.announce(announceFields({ port: 80 })), {
    code: 'tracker_failure',
    message: 'port 80 is below 1024',
  })
  await announce('127.0.0.9', { left: 0 })
  await eight.announce(announceFields())
  await announce('127.0.0.8', { left: 0, event: 'completed' })
  const reply = parseAnnounceReply(Buffer.from(await announce('127.0.0.10'), 'latin1'))
  assert.deepEqual({ complete: reply.complete, incomplete: reply.incomplete }, { complete: 2, incomplete: 1 })
  await using ten = udpTracker('127.0.0.10')
  for (const { peers } of [reply, await ten.announce(announceFields())])
    assert.deepEqual(
      peers.map(({ endpoint }) => formatEndpoint(endpoint)),
      ['127.0.0.8:6881'],
      'nobody is told of the drained host',
    )
  const written = async () => readFile(file, 'utf8').catch(() => '')
  await until('the line is written', async () => (await written()).endsWith('\n'))
  const { at, ...completion } = JSON.parse(await written()) as Record<string, unknown>
  assert.ok(Math.abs(Date.parse(String(at)) - Date.now()) < 60_000)
  assert.deepEqual(completion, {
    infoHash: infoHashToHex(testHash(0xaa)),
    peer: '127.0.0.8:6881',
    seeders: 2,
    leechers: 0,
  })
}

const openStore = async (config: Record<string, unknown>, now: () => number) => {
  const { default: create } = (await import(pathToFileURL(join(home, 'store.js')).href)) as {
    default: CreatePeerStore
  }
  return create(config, { levels: 2, sampleMax: 1000, random: Math.random, now, log: silentLog() })
}

peerStoreContract('the example’s store', async (clock) =>
  openStore({ peers_max: 5000, swarms_max: 100 }, () => clock.nowMs),
)

test('the example’s store: what does not fit is answered, not stored, and counted', async () => {
  await using store = await openStore({ peers_max: 3, swarms_max: 2 }, () => 0)
  for (let peer = 1; peer <= 5; peer++) await store.announce(announceOf({ peer }).announce)
  assert.deepEqual(store.totals(), { swarms: 1, seeders: 0, leechers: 3, refused: 2 })
  for (const swarm of [0, 1, 2])
    for (const event of ['completed', 'stopped'] as const)
      for (const peer of [1, 2, 3]) await store.announce(announceOf({ peer, swarm, left: 0, event }).announce)
  assert.deepEqual(store.totals(), { swarms: 2, seeders: 0, leechers: 0, refused: 2 })
  await assert.rejects(async () => openStore({ peers_max: -1 }, () => 0), /peers_max: need a whole number/)
})

test('embedded in CommonJS, it starts, and the process ends by itself', async () => {
  const script = `
    const { startTracker } = require('rackswarm')
    const at = '127.0.0.1:0'
    startTracker({ http: { addr: at }, udp: { addr: at }, tracker: { approval: 'none' } })
      .then((tracker) => tracker.close())
      .then(() => console.log('ended'))`
  const { stdout, stderr } = await run(process.execPath, ['-e', script], { cwd: home, timeout: 30_000 })
  assert.deepEqual({ stdout, stderr }, { stdout: 'ended\n', stderr: '' })
})

/** Runs the TypeScript of this checkout; nothing but Rackswarm's own types are to be found from where it runs. */
async function compile(directory: string, ...args: string[]): Promise<string> {
  return run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), ...args], {
    cwd: directory,
  }).then(
    () => '',
    (error: unknown) => String((error as { stdout: unknown }).stdout),
  )
}

/** The first fault of each file. */
function faultsOf(output: string): Map<string, string> {
  const faults = new Map<string, string>()
  for (const line of output.split('\n')) {
    const file = /^([\w.-]+)\(\d+,\d+\): error/.exec(line)?.[1]
    if (file !== undefined && !faults.has(file)) faults.set(file, line)
  }
  return faults
}

test('the types are whole: the example is strict, and a slip in it is found', async () => {
  const types = join(root, 'node_modules', '@types')
  const source = await readFile(join(home, 'hook.js'), 'utf8')
  const slip = source.replace('announce: { port } }', 'announce: { porte: port } }')
  assert.notEqual(slip, source)
  await writeFile(join(home, 'slip.js'), slip)
  const faults = faultsOf(await compile(home, '-p', '.', '--typeRoots', types))
  assert.deepEqual([...faults.keys()], ['slip.js'])
  assert.match(faults.get('slip.js') ?? '', /'porte' does not exist/)
})

test('the types need no others, not even Node’s, and know every setting', async () => {
  const directory = join(home, 'consumer')
  await mkdir(directory)
  const compilerOptions = {
    noEmit: true,
    strict: true,
    exactOptionalPropertyTypes: true,
    target: 'es2022',
    lib: ['es2022'],
    module: 'nodenext',
    types: [],
  }
  await writeFile(join(directory, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts'] }))
  const good = `
    import { ClientError, ConfigError, PeerSample, formatEndpoint, infoHashFromHex, startTracker } from 'rackswarm'
    import type { AnnounceRecord, EmbeddedSettings, EmbeddedTracker, PeerStore, PostHook, PreHook } from 'rackswarm'
    const hook: PreHook = {
      name: 'strict',
      announce: async (request) => {
        if (request.announce.infoHash !== infoHashFromHex('0'.repeat(40))) throw new ClientError('wrong', 'not this')
        request.extraIntervalSeconds += 1
      },
      peers: (request, peers) => peers.filter(({ distance }) => distance === 0 || request.frontend === 'udp'),
    }
    const told: PostHook = { name: 'told', announced: (record: AnnounceRecord) => void formatEndpoint(record.endpoint) }
    const settings: EmbeddedSettings = {
      http: { addr: '127.0.0.1:0', tls: { cert: 'cert.pem', key: 'key.pem' }, tracker_addr: ['127.0.0.1:1'] },
      tracker: { approval: 'none', trusted_announcers: ['10.0.0.0/8'] },
      topology: { levels: ['rack', 'row'], places: { a: { parents: ['b'] } }, prefixes: [{ cidr: '10.0.0.0/8', place: 'a' }] },
      prehooks: [{ name: './hook.js', options: { deep: [{ any: null }] } }],
      storage: { name: 'memory', config: { peers_max: 7 } },
    }
    export async function run(store: PeerStore): Promise<number> {
      await using tracker: EmbeddedTracker = await startTracker(settings, { hooks: [hook], postHooks: [() => told], store })
      const reply: Uint8Array = await tracker.announce('', '10.0.0.1')
      const faults: string[] = await tracker.reload({}).catch((error: unknown) =>
        error instanceof ConfigError ? [...error.faults] : [])
      const { seeders } = tracker.totals()
      return seeders + reply.length + faults.length + new PeerSample(7).toPeers().length + (tracker.addresses.http[0]?.port ?? 0)
    }`
  const slips = [
    ["approval: 'none'", "approval: 'nobody'"],
    ["addr: '127.0.0.1:0'", 'addr: 6969'],
    ["key: 'key.pem'", "kee: 'key.pem'"],
    ["name: 'memory'", 'name: 7'],
    ['distance === 0', "distance === 'near'"],
    ['seeders +', 'seeders.length +'],
  ] as const
  await writeFile(join(directory, 'good.ts'), good)
  for (const [i, [slip, what]] of slips.entries()) {
    assert.ok(good.includes(slip))
    await writeFile(join(directory, `slip-${i}.ts`), good.replace(slip, what))
  }
  const faults = faultsOf(await compile(directory, '-p', '.'))
  assert.deepEqual(
    [...faults.keys()].sort(),
    [...slips.keys()].map((i) => `slip-${i}.ts`),
  )
})

// A table of networks as operators use it: in a file beside the configuration, changed while the server runs, looked at with deployctl.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { endpointIp, formatIp } from '../../lib/protocol/address.ts'
import { parseAnnounceReply } from '../../lib/protocol/announce.ts'
import { bin, deployctl, startFleetServer } from '../support/fleet.ts'
import type { TrackerProcess } from '../support/tracker.ts'
import { announceQuery, first, httpGet, startTracker, temporaryDirectory } from '../support/tracker.ts'
import { until } from '../support/until.ts'

const hosts = ['127.0.1.1', '127.0.1.2', '127.0.2.1']
const settings = `tracker: { approval: none }
topology: { table: racks.csv, levels: [rack, { name: row, cost: 3 }], places: { a: { parents: [x] }, b: { parents: [x] } } }
`
const twoRacks = 'cidr,place\n127.0.1.0/24,a\n127.0.2.0/24,b\n'
const moved = `${twoRacks}127.0.1.1/32,b # it was carried over\n`

test('SIGHUP puts another table in force in every thread: a host that moved has new neighbours at its next announce', async (t) => {
  const { server, table } = await start(t, { workers: 2 })
  assert.deepEqual(await distances(server), { '127.0.1.2': 0, '127.0.2.1': 1 })
  await replace(table, moved)
  await reload(server, 'reloaded')
  assert.deepEqual(await distances(server), { '127.0.1.2': 1, '127.0.2.1': 0 })
  // Whichever thread a connection comes to.
  for (let i = 0; i < 20; i++)
    assert.deepEqual(await askOnce(server, '127.0.1.1'), { '127.0.1.2': 1, '127.0.2.1': 0 })
})

test('a table that changes counts within seconds, in every thread; one with faults is logged by line, and the one before stays', async (t) => {
  const { server, table } = await start(t, { workers: 2 })
  await distances(server)
  await replace(table, moved)
  await until('the table is loaded', async () => (await server.log()).includes('topology table loaded'))
  for (let i = 0; i < 20; i++) assert.deepEqual(await distances(server), { '127.0.1.2': 1, '127.0.2.1': 0 })
  await replace(table, `${twoRacks}127.0.1.0/24,b\n127.0.1.1/24,b\n`)
  await until('the broken table is seen', async () =>
    (await server.log()).includes('topology table not loaded'),
  )
  for (const words of [
    /racks\.csv:4: 127\.0\.1\.0\/24 is given as b here, and as a in line 2: keep one of the two/,
    /racks\.csv:5: .*did you mean 127\.0\.1\.0\/24\?/,
  ])
    assert.match(await server.log(), words)
  assert.deepEqual(await distances(server), { '127.0.1.2': 1, '127.0.2.1': 0 })
  // A reload asks for all at once, and changes nothing either.
  const failed = await reload(server, 'reload failed; what was in force stays')
  assert.match(failed, /racks\.csv:4: /)
  await rm(table)
  assert.match(
    await reload(server, 'reload failed; what was in force stays'),
    /cannot read .*racks\.csv: ENOENT/,
  )
  assert.deepEqual(await distances(server), { '127.0.1.2': 1, '127.0.2.1': 0 })
  await replace(table, twoRacks)
  await until('the new rack counts', async () => (await distances(server))['127.0.1.2'] === 0)
})

test('a server does not start with a table that has faults, and names them all', async (t) => {
  const directory = await temporaryDirectory(t)
  await writeFile(join(directory, 'racks.csv'), '127.0.1.1/24,a\nnonsense\n')
  const config = join(directory, 'server.yaml')
  await writeFile(config, `roles: [tracker]\nhttp: { addr: 127.0.0.1:0 }\nmetrics_addr: none\n${settings}`)
  const { code, stderr } = await run(bin('rackswarm-server'), ['--config', config])
  assert.equal(code, 78)
  assert.match(stderr, /racks\.csv:1: .*did you mean 127\.0\.1\.0\/24\?\n.*racks\.csv:2: need a network/)
})

test('what a level costs may change while the server runs, how many there are may not; slips are named', async (t) => {
  const { server, directory } = await start(t, { workers: 1 })
  const change = async (levels: string, message: string) => {
    const text = settings.replace(/levels: \[.*?\]/, `levels: ${levels}`)
    await writeFile(
      join(directory, 'server.yaml'),
      `roles: [tracker]\ndata_dir: ${directory}/data\nmetrics_addr: 127.0.0.1:0\n${text}http: { addr: 127.0.0.1:0 }\nudp: { addr: [] }\n`,
    )
    return reload(server, message)
  }
  await change('[{ name: rack, capacity: 40Gb }, { name: row, cost: 0.5 }]', 'reloaded')
  const failed = 'reload failed; what was in force stays'
  assert.match(
    await change('[rack]', failed),
    /topology\.(levels: another number|places\.a: got 1 parents, need 0)/,
  )
  assert.match(await change('[rack, { name: row, cost: -1 }]', failed), /topology\.levels\.1\.cost: /)
  assert.match(
    await change('[rack, { name: row, price: 1 }]', failed),
    /levels\.1\.price: there is no such setting/,
  )
  assert.match(
    await change('[rack, { name: row, capacity: 40 Gb }]', failed),
    /levels\.1\.capacity: need a rate such as/,
  )
})

test('deployctl topology check reads a configuration and a table without a server', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-topology-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const [config, table] = [join(directory, 'server.yaml'), join(directory, 'racks.csv')]
  await writeFile(config, settings)
  await writeFile(table, `${moved}fd00::/8,c\n`)
  const check = (...args: string[]) => run(bin('deployctl'), ['topology', 'check', ...args])
  const good = await check('--config', config)
  assert.equal(good.code, 0)
  assert.match(good.stdout, /^levels +rack, row cost 3$/m)
  assert.match(good.stdout, /^far peers +80 % of the same row, 20 % from anywhere else$/m)
  assert.match(good.stdout, /^places +3 with networks, 2 with parents$/m)
  assert.match(good.stdout, /^IPv4 +3 networks, 1 of them within another; any other address is in its \/24$/m)
  assert.match(good.stderr, /^warning: .*racks\.csv:5: c is not in topology\.places/m)
  const json = JSON.parse((await check('--config', config, '--json')).stdout) as Record<string, unknown>
  assert.deepEqual([json['ok'], json['ipv6']], [true, { networks: 1, nested: 0, otherwise: '/64' }])

  const next = join(directory, 'next.csv')
  await writeFile(next, '10.0.0.0/8,a\n10.0.0.1/8,a\n10.0.0.0/8,b\n')
  for (const args of [[next], ['--config', config, next]]) {
    const bad = await check(...args)
    assert.deepEqual([bad.code, bad.stdout], [2, ''])
    assert.match(bad.stderr, /next\.csv:2: .*did you mean 10\.0\.0\.0\/8\?\n.*next\.csv:3: .*as a in line 1/)
  }
  const told = await check(next, '--json')
  assert.equal(told.code, 2)
  assert.equal((JSON.parse(told.stdout) as { faults: string[] }).faults.length, 2)
  await writeFile(config, `${settings}topologie: {}\n`)
  assert.match(
    (await check('--config', config)).stderr,
    /server\.yaml:3:1 topologie: there is no such setting/,
  )
  assert.match((await check(join(directory, 'none.csv'))).stderr, /cannot read .*none\.csv: ENOENT/)
})

test('deployctl topology explain says why an address is where it is, by a file and by the running server', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-topology-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const table = join(directory, 'racks.csv')
  await writeFile(table, moved)
  const topology = `topology:
  levels: [rack, row]
  table: racks.csv
  places: { a: { parents: [x] }, b: { parents: [x] } }
  prefixes: [{ cidr: 127.0.0.0/8, place: here }]
`
  await using server = await startFleetServer(directory, { settings: topology })
  const expected = `127.0.1.1 is in b
  decided by  127.0.1.1/32  (${table}:4)
  above it    row x
  lost        127.0.1.0/24  a  (${table}:2)
  lost        127.0.0.0/8  here  (topology.prefixes.0)

127.0.1.2 is in a
  decided by  127.0.1.0/24  (${table}:2)
  above it    row x
  lost        127.0.0.0/8  here  (topology.prefixes.0)

fd00::1 is in fd00::/64
  decided by  fd00::/64  (topology.ipv6_prefix_length)
  above it    nothing: topology.places does not list it

127.0.1.1 – 127.0.1.2: distance 1, the same row
127.0.1.1 – fd00::1: distance 2, nothing in common
`
  const explain = (...args: string[]) => deployctl(server, ['topology', 'explain', ...args])
  const addresses = ['127.0.1.1', '127.0.1.2', 'fd00::1']
  const byServer = await explain(...addresses)
  assert.equal(byServer.stdout, expected, byServer.stderr)
  const offline = await explain('--config', join(directory, 'server.yaml'), ...addresses)
  assert.deepEqual([offline.stdout, offline.stderr], [expected, ''])
  const json = async (...args: string[]) => JSON.parse((await explain('--json', ...args)).stdout) as unknown
  assert.deepEqual(
    await json(...addresses),
    await json('--config', join(directory, 'server.yaml'), ...addresses),
  )
  // What the server has in force, not what the file says by now.
  await writeFile(table, 'nonsense\n')
  assert.equal((await explain(...addresses)).stdout, expected)
  assert.match(
    (await explain('--config', join(directory, 'server.yaml'), '127.0.1.1')).stderr,
    /racks\.csv:1: /,
  )
  await replace(table, twoRacks)
  await until('the new table explains it', async () =>
    (await explain('127.0.1.1')).stdout.startsWith('127.0.1.1 is in a\n'),
  )

  for (const args of [['127.0.1'], ['--config', join(directory, 'server.yaml'), '127.0.1']]) {
    const bad = await explain(...args)
    assert.equal(bad.code, 2, bad.stderr)
    assert.match(bad.stderr, /Cannot read address "127\.0\.1": need one such as/)
  }
  const stranger = await deployctl(server, ['topology', 'explain', '127.0.0.1'], {
    env: { DEPLOYCTL_TOKEN_FILE: join(directory, 'server', 'bootstrap-token') },
  })
  assert.equal(stranger.code, 4)
})

async function start(t: TestContext, { workers }: { workers: number }) {
  const directory = await temporaryDirectory(t)
  const table = join(directory, 'racks.csv')
  await writeFile(table, twoRacks)
  const server = await startTracker(t, `workers: ${workers}\n${settings}`, { directory })
  return { server, table, directory }
}

/** As a file is replaced well: by a whole one. */
async function replace(file: string, text: string): Promise<void> {
  await writeFile(`${file}.new`, text)
  await rename(`${file}.new`, file)
}

/** All hosts announce, then the first one once more. @returns how far the others are from it */
async function distances(server: TrackerProcess): Promise<Record<string, number>> {
  for (const host of hosts) await askOnce(server, host)
  return askOnce(server, '127.0.1.1')
}

async function askOnce(server: TrackerProcess, from: string): Promise<Record<string, number>> {
  const { body } = await httpGet(first(server.http), `/announce?${announceQuery({}, 'rackswarm=1')}`, {
    from,
  })
  const { peers } = parseAnnounceReply(Buffer.from(body, 'latin1'))
  return Object.fromEntries(
    peers
      .map(({ endpoint, distance }) => [formatIp(endpointIp(endpoint)), distance] as const)
      .sort(([a], [b]) => (a < b ? -1 : 1)),
  )
}

/** SIGHUP, which must end with the message. @returns the line of the log */
async function reload(server: TrackerProcess, message: string): Promise<string> {
  const lines = async () =>
    (await server.log()).split('\n').filter((line) => /"msg":"reload(ed|\s)/.test(line))
  const seen = (await lines()).length
  server.process.kill('SIGHUP')
  await until('more is logged', async () => (await lines()).length > seen)
  const line = (await lines())[seen] ?? ''
  assert.ok(line.includes(`"msg":"${message}"`), line)
  return line
}

async function run(file: string, args: readonly string[]) {
  const child = spawn(process.execPath, [file, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
  const output = { stdout: '', stderr: '' }
  child.stdout.on('data', (data: Buffer) => (output.stdout += data.toString()))
  child.stderr.on('data', (data: Buffer) => (output.stderr += data.toString()))
  const [code] = (await once(child, 'close')) as [number | null]
  return { code, ...output }
}

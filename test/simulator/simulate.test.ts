import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { test } from 'node:test'
import { Picker } from '../../agent/engine/picker.ts'
import { describe, draw, summarize } from '../../simulator/report.ts'
import { rackSizesOf, Scenario } from '../../simulator/scenario.ts'
import { simulate } from '../../simulator/simulate.ts'
import { temporaryDirectory } from '../agent/engine/fixtures.ts'

const small = { hosts: 60, racks: 6, size: '32MiB', host_uplink: '100Mb', rack_uplink: '1Gb' }

function run(settings: Record<string, unknown>) {
  const result = simulate(Scenario.parse({ ...small, ...settings }))
  return { result, summary: summarize(result) }
}

test('a clean run: every host has the build, nothing is better than possible, and little is sent twice', () => {
  const { summary } = run({})
  assert.equal(summary.finished, 60)
  assert.ok((summary.seconds.p50 ?? 0) >= summary.bound.seconds)
  assert.ok(
    summary.originOfBuild > 0.999 && summary.originOfBuild < 1.05,
    `${summary.originOfBuild} from the server`,
  )
  const { crossRackOfMin = 0 } = summary
  assert.ok(crossRackOfMin > 0.999 && crossRackOfMin < 1.3, `${crossRackOfMin} copies a rack`)
  assert.ok((summary.seconds.max ?? Infinity) < 4 * summary.bound.seconds, `${summary.seconds.max} s`)
})

test('the same seed gives the same run, another one another', () => {
  const [one, again, other] = [run({ seed: 7 }), run({ seed: 7 }), run({ seed: 8 })]
  assert.deepEqual(one.result.hosts, again.result.hosts)
  assert.notDeepEqual(one.result.hosts, other.result.hosts)
})

test('it runs the picker that agents run: without the claims of neighbours more comes into each rack', (t) => {
  const before = run({}).summary
  t.mock.method(Picker.prototype, 'claimed', () => undefined)
  const without = run({}).summary
  assert.ok(
    without.crossRackBytes > before.crossRackBytes,
    `${without.crossRackBytes} after ${before.crossRackBytes}`,
  )
})

const faults: Record<string, Record<string, unknown>> = {
  'a fifth goes away and comes back': { churn: { share: 0.2, away: '50%' } },
  'a tenth is slow': { slow: { share: 0.1, factor: 0.1 } },
  'a gateway of each rack dies': { dead_gateways: { at: '30%' } },
  'the uplink of a rack is at a tenth': { slow_racks: { share: 0.17, factor: 0.1, at: '30%', for: '50%' } },
  'the first host dies after two copies': { from_server: false, seed_dies: { after_copies: 2 } },
  'the tracker is away for a minute': { tracker_away: { at: '10%', for: '60s' } },
  'the server is away for a while': { server_away: { at: '20%', for: '2s' } },
  'a tenth comes late': { late: { share: 0.1, at: '80%' } },
  'two builds at once': { releases: 2 },
  'half of them are other clients': { standard_clients: 0.5 },
  'one rack has nearly all': { rack_sizes: [55] },
  'rows above racks': { rows: 2, row_uplink: '500Mb' },
}

for (const [name, settings] of Object.entries(faults)) {
  test(`every host that is there has the build in the end: ${name}`, () => {
    const { summary } = run(settings)
    assert.equal(summary.unfinished, 0, describe(run(settings).result))
    // Wide: it only tells an end from a crawl.
    const { max = Infinity } = summary.spared
    assert.ok(max < 70 + 5 * summary.bound.seconds, `${max} s`)
  })
}

test('one host that fetches from one that has the build', () => {
  const { summary } = run({ hosts: 2, racks: 2, from_server: false })
  assert.equal(summary.finished, 1)
  assert.ok((summary.seconds.max ?? Infinity) < 1.05 * summary.bound.seconds, `${summary.seconds.max} s`)
})

test('a build of one piece, where what hosts say takes time, is passed on by those who have it', () => {
  const settings = { size: '1KiB', delay: '50ms', from_server: false, seed_dies: { after_copies: 1.05 } }
  const { summary } = run({ ...settings, hosts: 30, racks: 30 })
  assert.equal(summary.unfinished, 0)
  assert.ok((summary.seconds.max ?? Infinity) < 3, `${summary.seconds.max} s`)
})

test('what a host was fetching from another that dies comes from the server', () => {
  const { summary } = run({ hosts: 2, racks: 2, dead_gateways: { racks: 0.5, at: '50%' } })
  assert.equal(summary.gone, 1)
  assert.equal(summary.unfinished, 0)
})

test('where every host runs another client, the server is their webseed', () => {
  const { summary } = run({ standard_clients: 1 })
  assert.equal(summary.unfinished, 0)
  assert.ok(summary.originOfBuild >= 1, `${summary.originOfBuild} from the server`)
})

test('hosts that come late, go away and die, all in one run: each life of a host is one, and it announces as one', () => {
  const { result, summary } = run({
    late: { share: 0.5, at: '30%' },
    churn: { share: 1, away: '10%' },
    dead_gateways: { racks: 0.5, at: '60%' },
    tracker_away: { at: '20%', for: '20s' },
  })
  assert.equal(summary.unfinished, 0, describe(result))
  assert.ok(summary.announces < 20 * summary.hosts, `${summary.announces} announces`)
})

test("the server is away while nobody has anything new: afterwards neighbours do not fetch each other's pieces", () => {
  const settings = { hosts: 60, racks: 2, host_uplink: '100Mb', rack_uplink: '50Mb' }
  const { summary } = run({ ...settings, server_away: { at: '34%', for: '60s' } })
  assert.equal(summary.unfinished, 0)
  assert.ok((summary.crossRackOfMin ?? 9) < 1.2, `${summary.crossRackOfMin} copies a rack`)
})

test('racks that are given add up, whatever they are', () => {
  const sizes = (settings: Record<string, unknown>) => rackSizesOf(Scenario.parse(settings))
  assert.deepEqual(sizes({ hosts: 10, racks: 4, rack_sizes: [5] }), [5, 2, 2, 1])
  assert.deepEqual(sizes({ hosts: 10, racks: 2, rack_sizes: [3, 4] }), [5, 5])
  assert.deepEqual(sizes({ hosts: 10, racks: 3, rack_sizes: [30, 4] }), [10])
})

test('racks of one host each, which have nobody near, need hardly longer than they must', () => {
  const { summary } = run({ hosts: 60, racks: 60, size: '128MiB', host_uplink: '1Gb', rack_uplink: '4Gb' })
  assert.ok((summary.seconds.max ?? Infinity) < 1.25 * summary.bound.seconds, `${summary.seconds.max} s`)
  assert.ok((summary.crossRackOfMin ?? 9) < 1.05, `${summary.crossRackOfMin} copies a rack`)
})

test('1,000 hosts in 25 racks', () => {
  const { summary } = run({ hosts: 1000, racks: 25, size: '32MiB', host_uplink: '1Gb', rack_uplink: '4Gb' })
  assert.equal(summary.finished, 1000)
  assert.ok(summary.originOfBuild < 1.1, `${summary.originOfBuild} from the server`)
  assert.ok((summary.crossRackOfMin ?? 9) < 1.3, `${summary.crossRackOfMin} copies a rack`)
})

test('deployctl simulate: a scenario file, flags that win over it, a drawing, and faults with their lines', async (t) => {
  const directory = await temporaryDirectory(t)
  const file = join(directory, 'scenario.yaml')
  const svg = join(directory, 'racks.svg')
  await writeFile(file, 'hosts: 30\nracks: 3\nsize: 16MiB\nslow: { share: 0.1 }\n')
  const program = resolve(import.meta.dirname, '..', '..', 'bin', 'deployctl.js')
  const call = (...args: string[]) =>
    execFileSync(process.execPath, [program, 'simulate', ...args], { encoding: 'utf8', stdio: 'pipe' })
  const text = call('--scenario', file, '--hosts', '40', '--host-uplink', '1Gb', '--svg', svg)
  assert.match(text, /hosts +40 in 3 racks/)
  assert.match(text, /p99 of hosts not hit/)
  assert.match(await readFile(svg, 'utf8'), /^<svg .*bound/s)
  const json = JSON.parse(call('--scenario', file, '--json')) as { hosts: { seconds: number }[] }
  assert.equal(json.hosts.length, 30)
  await writeFile(file, 'hosts: 30\nrakcs: 3\n')
  assert.throws(() => call('--scenario', file), /scenario\.yaml:2.*rakcs/s)
  assert.throws(() => call('--host-uplink', 'fast'), /host_uplink: need a rate such as 10Gb/)
})

test('a drawing has a line for each rack', () => {
  const { result } = run({ racks: 4 })
  assert.equal(draw(result).match(/stroke="#4477aa"/g)?.length, 4)
})

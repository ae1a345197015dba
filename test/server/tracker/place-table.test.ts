import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { formatIp, ipFromBytes, parseIp } from '../../../lib/protocol/address.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { parsePlace } from '../../../lib/protocol/place.ts'
import { ConfigError } from '../../../lib/runtime/config.ts'
import { loadPlaceTable, parsePlaceTable, readPlaceTable } from '../../../server/tracker/place-table.ts'
import type { PrefixTable } from '../../../server/tracker/prefix-table.ts'
import { countRules, rulesAround, rulesOf } from '../../../server/tracker/prefix-table.ts'

const file = 'racks.csv'

test('a table is read whoever wrote it: header, comments, blank lines, CRLF, quotes, a byte order mark, no feed at the end', () => {
  const table = parsePlaceTable(
    '\uFEFFcidr,place\r\n# racks\r\n\r\n10.0.0.0/8,r1\r\n"10.1.0.0/16","row/r2" # half of it\r\n  fd00::/8 ,\tr3\r\n10.1.2.3,r4',
    file,
    [],
  )
  assert.deepEqual(
    [...rulesOf(table)].map(({ network, place, source }) => `${source} ${network} ${place}`),
    ['4 10.0.0.0/8 r1', '5 10.1.0.0/16 row/r2', '7 10.1.2.3/32 r4', '6 fd00::/8 r3'],
  )
  assert.equal(parsePlaceTable('', file, []).places.length, 0)
  assert.equal(parsePlaceTable('cidr,place\n', file, []).places.length, 0)
})

test('every fault is told at once, with its line and what to do', () => {
  const lines: readonly (readonly [string, RegExp?])[] = [
    ['10.0.0.0/8,r1'],
    ['10.1.2.3/24,r1', /racks\.csv:2: .*10\.1\.2\.3\/24.*host bits are set; did you mean 10\.1\.2\.0\/24\?/],
    ['fd00::1/64,r1', /racks\.csv:3: .*did you mean fd00::\/64\?/],
    ['10.0.0.0/33,r1', /racks\.csv:4: .*need a prefix length from 0 to 32/],
    ['010.0.0.0/8,r1', /racks\.csv:5: Cannot read network "010\.0\.0\.0\/8": need an address/],
    ['10.1/16,r1', /racks\.csv:6: .*need an address/],
    ['::ffff:10.0.0.0/104,r1', /racks\.csv:7: .*write an IPv4-mapped network as IPv4/],
    ['10.2.0.0/16', /racks\.csv:8: need a network and its place.*got 1 field/],
    ['10.2.0.0/16;r1', /racks\.csv:9: .*got 1 field/],
    ['10.2.0.0/16,r1,x', /racks\.csv:10: .*got 3 fields/],
    ['10.2.0.0/16,', /racks\.csv:11: Cannot read place ""/],
    ['10.2.0.0/16,a rack', /racks\.csv:12: Cannot read place "a rack": need up to 64/],
    ['cidr,place', /racks\.csv:13: Cannot read network "cidr"/],
    ['10.0.0.0/8,r2', /racks\.csv:14: 10\.0\.0\.0\/8 is given as r2 here, and as r1 in line 1: keep one/],
    ['10.0.0.0/8,r1'],
    [
      '10.9.0.0/16,r2',
      /racks\.csv:16: 10\.9\.0\.0\/16 is given as r2 here, and as r1 in topology\.prefixes\.0: keep one/,
    ],
  ]
  const prefixes = [{ cidr: parseCidr('10.9.0.0/16'), place: parsePlace('r1') }]
  const faults = faultsOf(() => parsePlaceTable(lines.map(([line]) => line).join('\n'), file, prefixes))
  const expected = lines.flatMap(([, words]) => (words ? [words] : []))
  for (const [i, words] of expected.entries()) assert.match(faults[i] ?? '', words)
  assert.equal(faults.length, expected.length)
})

test('of many faults twenty are shown, and the number of the others', () => {
  const faults = faultsOf(() => parsePlaceTable('nonsense\n'.repeat(1000), file, []))
  assert.deepEqual([faults.length, faults.at(-1)], [21, 'racks.csv: and 980 faults more'])
  const twice = Array.from(
    { length: 500 },
    (_, i) => `10.${i >> 8}.${i & 255}.0/24,r1\n10.${i >> 8}.${i & 255}.0/24,r2\n`,
  )
  assert.equal(
    faultsOf(() => parsePlaceTable(twice.join(''), file, [])).at(-1),
    'racks.csv: and 480 faults more',
  )
})

test('a table has a bound, in networks and in bytes', async (t) => {
  const path = await write(t, '10.0.0.0/8,r1\n10.1.0.0/16,r1\n10.2.0.0/16,r1\n')
  assert.match(
    faultsOf(() => loadPlaceTable(path, [], { networksMax: 2, bytesMax: 1000 })).join('\n'),
    /racks\.csv:3: a table has at most 2 networks; what follows was not read/,
  )
  assert.match(
    faultsOf(() => loadPlaceTable(path, [], { networksMax: 2, bytesMax: 40 })).join('\n'),
    /topology\.table: cannot read .*racks\.csv: it has 44 bytes, and a table has at most 40/,
  )
})

test('what cannot be read is named: no file, a directory', async (t) => {
  const path = await write(t, '')
  await assert.rejects(
    readPlaceTable(`${path}-gone`, []),
    /topology\.table: cannot read .*racks\.csv-gone: ENOENT/,
  )
  await assert.rejects(
    readPlaceTable(join(path, '..'), []),
    /topology\.table: cannot read .*: it is not a file/,
  )
  await writeFile(path, 'x')
  await assert.rejects(readPlaceTable(path, []), /racks\.csv:1: need a network and its place/)
})

test('fifty thousand nested networks of both families are read in another thread, and every one of them decides where it should', async (t) => {
  const lines = ['cidr,place']
  // /16 within /8, four /22 in each, /24 in those, and hosts; as many of IPv6.
  for (let i = 0; i < 25_000; i++) {
    const [a, b, c] = [i % 250, Math.floor(i / 250) % 25, Math.floor(i / 6250)]
    const kind = i % 5
    lines.push(
      `10.${a}.${b * 10 + c}.${kind === 0 ? `0/24` : `${kind * 16}/${28 + (kind % 4)}`},rack-${i % 2000}`,
      `fd00:${a.toString(16)}:${b.toString(16)}:${c.toString(16)}::${kind === 0 ? '/64' : `${kind}:0/${112 + kind}`},rack-${i % 2000}`,
    )
  }
  for (let a = 0; a < 250; a++) lines.push(`10.${a}.0.0/16,row-${a}`, `fd00:${a.toString(16)}::/32,row-${a}`)
  lines.push('10.0.0.0/8,site', 'fd00::/8,site')
  const path = await write(t, lines.join('\n'))
  const startMs = performance.now()
  const table = await readPlaceTable(path, [])
  // It takes a fifth of a second; here only that nothing is quadratic.
  assert.ok(performance.now() - startMs < 20_000)
  const wanted = lines.slice(1).map((line) => {
    const [address = '', rest = ''] = line.split('/')
    const ip = parseIp(address) ?? assert.fail(line)
    return { ip, rule: `${formatIp(ip)}/${rest}` }
  })
  for (const { ip, rule } of wanted) {
    const found = rulesAround(table, ip)
    assert.ok(
      found.some(({ network, place }) => `${network},${place}` === rule),
      rule,
    )
    assertNested(found)
  }
  const count = countRules(table, 4).networks + countRules(table, 6).networks
  assert.equal(count, new Set(wanted.map(({ rule }) => rule)).size)
  // Anywhere else too: the ranges and the chains of what is around them agree.
  for (let i = 0; i < 20_000; i++) {
    const bytes = Uint8Array.of(10, i % 256, (i * 7) % 256, (i * 13) % 256)
    assertNested(rulesAround(table, ipFromBytes(bytes)))
    assert.equal(placesAt(table, bytes).at(-1), 'site')
  }
})

function placesAt(table: PrefixTable, bytes: Uint8Array): string[] {
  return rulesAround(table, ipFromBytes(bytes)).map(({ place }) => place)
}

function assertNested(rules: readonly { readonly network: string }[]): void {
  const lengths = rules.map(({ network }) => Number(network.split('/')[1]))
  assert.deepEqual(
    lengths,
    lengths.toSorted((a, b) => b - a),
    formatIp(parseIp(rules[0]?.network.split('/')[0] ?? '::') ?? assert.fail()),
  )
}

function faultsOf(work: () => unknown): readonly string[] {
  try {
    work()
  } catch (error) {
    if (error instanceof ConfigError) return error.faults
    throw error
  }
  return assert.fail('there was no fault')
}

async function write(t: TestContext, text: string): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-table-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const path = join(directory, file)
  await writeFile(path, text)
  return path
}

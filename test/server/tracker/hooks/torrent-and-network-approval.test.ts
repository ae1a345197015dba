import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import fc from 'fast-check'
import { formatIp, ipFromBytes } from '../../../../lib/protocol/address.ts'
import { cidrContains, parseCidr } from '../../../../lib/protocol/cidr.ts'
import { createByteSet } from '../../../../server/tracker/hooks/byte-set.ts'
import { networkApproval } from '../../../../server/tracker/hooks/network-approval.ts'
import { createNetworkSet } from '../../../../server/tracker/hooks/network-set.ts'
import { torrentApproval } from '../../../../server/tracker/hooks/torrent-approval.ts'
import { announceOf, answer, createHook, ipOf, scrapeOf } from './support.ts'

const listed = '3532cf2d327fad8448c075b4cb42c8136964a435'
const other = '4532cf2d327fad8448c075b4cb42c8136964a435'

test('torrent approval: a whitelist approves what is on it, a blacklist what is not', async (t) => {
  const white = await createHook(t, torrentApproval, { whitelist: [listed.toUpperCase()] })
  const black = await createHook(t, torrentApproval, { blacklist: [listed] })
  assert.equal(
    answer(() => white.announce?.(announceOf({ infoHash: listed }))),
    'ok',
  )
  assert.equal(
    answer(() => white.announce?.(announceOf({ infoHash: other }))),
    'unapproved torrent',
  )
  assert.equal(
    answer(() => black.announce?.(announceOf({ infoHash: listed }))),
    'unapproved torrent',
  )
  assert.equal(
    answer(() => black.announce?.(announceOf({ infoHash: other }))),
    'ok',
  )
})

test('torrent approval: a scrape with one infohash that is not approved is refused', async (t) => {
  const white = await createHook(t, torrentApproval, { whitelist: [listed] })
  assert.equal(
    answer(() => white.scrape?.(scrapeOf({ infoHashes: [listed] }))),
    'ok',
  )
  assert.equal(
    answer(() => white.scrape?.(scrapeOf({ infoHashes: [listed, other] }))),
    'unapproved torrent',
  )
})

test('torrent approval: both lists are a fault, and so is a text that is no infohash', () => {
  const faults = (options: unknown) =>
    torrentApproval.options.safeParse(options).error?.issues.map(({ message }) => message)
  assert.deepEqual(faults({ whitelist: [listed], blacklist: [other] }), [
    'using both whitelist and blacklist is invalid',
  ])
  assert.deepEqual(faults({ whitelist: ['0xff'] }), ['Cannot read infohash "0xff": need 40 hex digits'])
})

test('network approval: a whitelist approves what is in it, a blacklist what is not, scrapes too', async (t) => {
  const cidrs = ['10.1.0.0/16', '192.0.2.7', 'fd00:1::/32']
  const white = await createHook(t, networkApproval, { whitelist: cidrs })
  const black = await createHook(t, networkApproval, { blacklist: cidrs })
  const inside = ['10.1.255.255', '192.0.2.7', 'fd00:1:ffff::1', '::ffff:10.1.0.0']
  const outside = ['10.2.0.0', '192.0.2.6', 'fd00:2::', '::']
  for (const source of [...inside, ...outside]) {
    const [wanted, opposite] = inside.includes(source)
      ? ['ok', 'unapproved network']
      : ['unapproved network', 'ok']
    assert.equal(
      answer(() => white.announce?.(announceOf({ source }))),
      wanted,
      source,
    )
    assert.equal(
      answer(() => white.scrape?.(scrapeOf({ source }))),
      wanted,
      source,
    )
    assert.equal(
      answer(() => black.announce?.(announceOf({ source }))),
      opposite,
      source,
    )
    assert.equal(
      answer(() => black.scrape?.(scrapeOf({ source }))),
      opposite,
      source,
    )
  }
})

test('network approval: a network with host bits is a fault that says which one was meant', () => {
  const { error } = networkApproval.options.safeParse({ blacklist: ['10.1.2.3/16'] })
  assert.match(error?.message ?? '', /did you mean 10\.1\.0\.0\/16/)
})

test('lists in files: comments, blank lines and CRLF, and the faults of a bad file with their lines', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'lists-'))
  t.after(() => rm(directory, { recursive: true }))
  const file = join(directory, 'networks')
  await writeFile(file, '\ufeff# ours\r\n\r\n10.1.0.0/16 # the lab\r\n  fd00::/8\r\n10.1.0.0/16')
  const hook = await createHook(t, networkApproval, { whitelist_file: file })
  assert.equal(hook.list.kind, 'whitelist')
  assert.equal(hook.list.entries, 2)
  assert.equal(hook.list.file, file)
  assert.equal(
    answer(() => hook.announce?.(announceOf({ source: '10.1.2.3' }))),
    'ok',
  )
  assert.equal(
    answer(() => hook.announce?.(announceOf({ source: '10.2.2.3' }))),
    'unapproved network',
  )

  await writeFile(join(directory, 'torrents'), `${listed}\n\nnot a hash\n${other}\n${listed}0\n`)
  await assert.rejects(createHook(t, torrentApproval, { blacklist_file: join(directory, 'torrents') }), {
    message: [
      `Cannot use list ${directory}/torrents:`,
      `  ${directory}/torrents:3: Cannot read infohash "not a hash": need 40 hex digits`,
      `  ${directory}/torrents:5: Cannot read infohash "${listed}0": need 40 hex digits`,
    ].join('\n'),
  })
})

// Few distinct bytes, so that networks nest and addresses are inside some.
const byte = fc.constantFrom(0, 1, 10, 127, 128, 192, 254, 255)
const address = fc.oneof(
  fc.uint8Array({ minLength: 4, maxLength: 4 }),
  fc.tuple(byte, byte, byte, byte).map((bytes) => Uint8Array.from(bytes)),
  fc.array(byte, { minLength: 16, maxLength: 16 }).map((bytes) => Uint8Array.from(bytes)),
)
const network = fc
  .tuple(address, fc.nat(128))
  .map(([bytes, length]) => {
    const bits = Math.min(length, 8 * bytes.length)
    const masked = bytes.map((one, i) => one & (0xff00 >> Math.min(8, Math.max(0, bits - 8 * i))))
    return { bytes: masked, bits }
  })
  .filter(({ bytes }) => bytes.length === 4 || ipFromBytes(bytes).family === 6)
  .map(({ bytes, bits }) => parseCidr(`${formatIp(ipFromBytes(bytes))}/${bits}`))

test('a set of networks has the addresses that a scan through them finds', () => {
  fc.assert(
    fc.property(
      fc.array(network, { maxLength: 30 }),
      fc.array(address, { minLength: 1, maxLength: 20 }),
      (cidrs, asked) => {
        const set = createNetworkSet(cidrs.length)
        for (const cidr of cidrs) set.add(cidr)
        for (const bytes of [...asked, ...cidrs.map((cidr) => cidr.bytes)]) {
          const ip = ipFromBytes(bytes)
          assert.equal(
            set.has(ip),
            cidrs.some((cidr) => cidrContains(cidr, ip)),
            formatIp(ip),
          )
        }
      },
    ),
    { numRuns: 1000 },
  )
})

test('0.0.0.0/0 has all of IPv4 and nothing of IPv6', () => {
  const set = createNetworkSet(1)
  set.add(parseCidr('0.0.0.0/0'))
  assert.equal(set.has(ipOf('255.1.2.3')), true)
  assert.equal(set.has(ipOf('fd00::1')), false)
})

test('a set of byte strings has what was added, each once, and no more than it has room for', () => {
  const key = fc.tuple(fc.nat(3), fc.nat(3), fc.nat(255)).map((bytes) => Uint8Array.from(bytes))
  fc.assert(
    fc.property(fc.array(key, { maxLength: 200 }), fc.array(key), (added, asked) => {
      const model = new Set(added.map((bytes) => bytes.join()))
      const set = createByteSet(3, model.size)
      for (const bytes of added) set.add(bytes)
      assert.equal(set.size, model.size)
      for (const bytes of [...added, ...asked]) assert.equal(set.has(bytes), model.has(bytes.join()))
      assert.throws(() => set.add(Uint8Array.of(9, 9, 9)), /it is full/)
    }),
  )
})

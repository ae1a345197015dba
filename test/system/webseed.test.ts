import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import type { IncomingMessage } from 'node:http'
import { get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { parseTorrent } from '../../lib/protocol/metainfo.ts'
import type { FleetServer } from '../support/fleet.ts'
import { deployctlOk, startFleetServer, writeRandomFile } from '../support/fleet.ts'
import { until } from '../support/until.ts'

const sizeBytes = 8 * 1024 * 1024

let directory = ''
let server: FleetServer
let build: Buffer
let webseed = ''

before(async () => {
  directory = await mkdtemp(join(tmpdir(), 'rackswarm-webseed-'))
  server = await startFleetServer(directory, {
    settings: 'registry: { webseed: { replies_max: 4, rate: 4MiB } }\n',
  })
  const file = join(directory, 'build.tar')
  await writeRandomFile(file, sizeBytes)
  await deployctlOk(server, ['publish', file, 'web:1'])
  build = await readFile(file)
  webseed = await webseedOf('web:1')
})

after(async () => {
  await server[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

test('the webseed serves ranges of the blob that its token is for, to nobody else', async () => {
  const whole = await fetch(webseed, { method: 'HEAD' })
  assert.deepEqual([whole.status, whole.headers.get('content-length')], [200, String(sizeBytes)])
  const part = await fetch(webseed, { headers: { range: 'bytes=1000-1999' } })
  assert.deepEqual([part.status, part.headers.get('content-range')], [206, `bytes 1000-1999/${sizeBytes}`])
  assert.ok(Buffer.from(await part.arrayBuffer()).equals(build.subarray(1000, 2000)))
  assert.equal((await fetch(webseed, { headers: { range: `bytes=${sizeBytes}-` } })).status, 416)
  const [, token = '', hex = ''] = /\/webseed\/([^/]+)\/([0-9a-f]+)$/.exec(webseed) ?? []
  const announce = JSON.parse(await deployctlOk(server, ['token', 'mint', 'web:1', '--json'])) as {
    token: string
  }
  for (const [what, url, status] of [
    ['another blob', webseed.replace(hex, '0'.repeat(64)), 404],
    ['a token for announces', webseed.replace(token, announce.token), 403],
    ['a tampered token', webseed.replace(token, `${token.slice(0, -8)}AAAAAAAA`), 403],
    ['no token', webseed.replace(token, 'x'), 403],
  ] as const)
    assert.equal((await fetch(url)).status, status, what)
})

test('bytes a second are bounded, for all replies together', async () => {
  const startedAt = Date.now()
  const halves = [`bytes=0-${sizeBytes / 2 - 1}`, `bytes=${sizeBytes / 2}-`]
  const parts = await Promise.all(
    halves.map(async (range) =>
      Buffer.from(await (await fetch(webseed, { headers: { range } })).arrayBuffer()),
    ),
  )
  assert.ok(Buffer.concat(parts).equals(build))
  assert.ok(Date.now() - startedAt > 1_700, '8 MiB at 4 MiB/s')
})

test('who does not read holds half of the replies at most; beyond the budget it is 503, with when to come again', async () => {
  const stuck = [await openReply(webseed), await openReply(webseed)]
  const third = await fetch(webseed, { headers: { range: 'bytes=0-9' } })
  assert.deepEqual([third.status, third.headers.get('retry-after')], [503, '2'])
  const other = join(directory, 'other-token')
  await deployctlOk(server, ['token', 'create', '--name', 'other', '--scope', 'pull:*', '--output', other])
  const others = await webseedOf('web:1', { DEPLOYCTL_TOKEN_FILE: other })
  assert.equal((await fetch(others, { headers: { range: 'bytes=0-9' } })).status, 206)
  for (const reply of stuck) reply.destroy()
  await until('a reply that ended gives its turn back', async () => {
    const { status } = await fetch(webseed, { headers: { range: 'bytes=0-9' } })
    return status === 206
  })
  const metrics = await (await fetch(`${server.metricsUrl}/metrics`)).text()
  assert.match(metrics, /^rackswarm_webseed_busy_total [1-9]/m)
  assert.match(metrics, /^rackswarm_webseed_bytes_total [1-9]/m)
})

async function webseedOf(reference: string, env: Record<string, string> = {}): Promise<string> {
  const torrent = join(directory, 'build.torrent')
  await deployctlOk(server, ['torrent', reference, '--output', torrent], env)
  return parseTorrent(await readFile(torrent)).urlList[0] ?? ''
}

/** A reply that has begun and is not read. */
async function openReply(url: string): Promise<IncomingMessage> {
  const request = get(url)
  request.on('error', () => undefined)
  const [response] = (await once(request, 'response')) as [IncomingMessage]
  response.on('error', () => undefined)
  response.pause()
  return response
}

// kill -9 of the server at random points of pushes: every blob that was acknowledged is whole, every other is whole or
// absent, and a push that was cut can be made again. `npm run soak -- crash-server [PUSHES]` (default 200).
import assert from 'node:assert/strict'
import { createHash, randomBytes, randomInt } from 'node:crypto'
import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { freePort } from '../support/foreign.ts'
import { startFleetServer } from '../support/fleet.ts'

const sizeMax = 6 * 1024 * 1024

/** @returns how many pushes were acknowledged and how many were cut. @throws AssertionError when a blob is lost or broken */
export async function crashServer(pushes: number): Promise<{ acknowledged: number; cut: number }> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-crash-server-'))
  const http = `addr: 127.0.0.1:${await freePort()}`
  let server = await startFleetServer(directory, { http })
  const sent = new Map<string, { bytes: Buffer; acknowledged: boolean }>()
  try {
    const admin = (await readFile(server.adminTokenFile, 'utf8')).trim()
    const headers = { authorization: `Bearer ${admin}` }
    for (let i = 0; i < pushes; i++) {
      const bytes = randomBytes(randomInt(1, sizeMax))
      const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`
      const entry = { bytes, acknowledged: false }
      sent.set(digest, entry)
      const pushing = push(server.publicUrl, headers, digest, bytes).then(
        (ok) => (entry.acknowledged = ok),
        () => false,
      )
      await sleep(randomInt(0, 60))
      server.process.kill('SIGKILL')
      await server.exited
      await pushing
      server = await startFleetServer(directory, { http })
      // Whatever was cut is sent again every now and then, so that a broken leftover would be in the way.
      if (i % 5 === 4 && !entry.acknowledged)
        entry.acknowledged = await push(server.publicUrl, headers, digest, bytes)
    }
    for (const [digest, { bytes, acknowledged }] of sent) {
      const response = await fetch(`${server.publicUrl}/v2/crash/blobs/${digest}`, { headers })
      const body = Buffer.from(await response.arrayBuffer())
      if (response.status === 200) assert.ok(body.equals(bytes), `${digest} is broken`)
      else assert.ok(!acknowledged, `${digest} was acknowledged and is lost: status ${response.status}`)
    }
    const acknowledged = [...sent.values()].filter((entry) => entry.acknowledged).length
    // Sessions of cut uploads stay for their owners to resume, within their bound and their time.
    const leftovers = await readdir(join(server.dataDirectory, 'uploads')).catch(() => [])
    assert.ok(leftovers.length <= pushes - acknowledged + pushes / 5)
    return { acknowledged, cut: pushes - acknowledged }
  } finally {
    await server[Symbol.asyncDispose]()
    await rm(directory, { recursive: true, force: true })
  }
}

async function push(
  url: string,
  headers: Record<string, string>,
  digest: string,
  bytes: Buffer,
): Promise<boolean> {
  const started = await fetch(`${url}/v2/crash/blobs/uploads/?length=${bytes.length}`, {
    method: 'POST',
    headers,
  })
  const location = new URL(started.headers.get('location') ?? '', url)
  await started.arrayBuffer()
  location.searchParams.set('digest', digest)
  const response = await fetch(location, {
    method: 'PUT',
    headers: { ...headers, 'content-type': 'application/octet-stream' },
    body: new Uint8Array(bytes),
  })
  await response.arrayBuffer()
  return response.status === 201
}

if (import.meta.main) {
  const pushes = Number(process.argv[2] ?? 200)
  const { acknowledged, cut } = await crashServer(pushes)
  process.stdout.write(`${pushes} pushes: ${acknowledged} acknowledged, all whole; ${cut} cut, none broken\n`)
}

import assert from 'node:assert/strict'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { openCredential } from '../../agent/credential.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import { until } from '../support/until.ts'
import { temporaryDirectory } from './engine/fixtures.ts'

const dayMs = 86_400_000

/** A credential that is run, with an enrolment that fails as often as asked. */
async function start(t: TestContext, file: string, failures: number) {
  let tries = 0
  const credential = await openCredential(
    { file, server: 'http://server', host: 'a1', place: undefined, bootstrapToken: async () => 'bootstrap' },
    {
      now: Date.now,
      random: () => 0,
      log: silentLog(),
      server: {
        enroll: async () => {
          if (tries++ < failures) throw new Error('the server is away')
          return { host: 'a1', credential: 'new', expiresAt: new Date(Date.now() + dayMs).toISOString() }
        },
        renew: async () => Promise.reject(new Error('not due yet')),
      },
    },
  )
  const stop = new AbortController()
  const running = credential.run(stop.signal)
  t.after(async () => {
    stop.abort(new Error('the test has ended'))
    await running
  })
  return { credential, ready: credential.ready(stop.signal) }
}

test('who waits for a credential gets it, though the first tries to replace an expired one failed', async (t) => {
  const file = join(await temporaryDirectory(t), 'credential.json')
  const expired = { host: 'a1', credential: 'old', expiresAt: new Date(Date.now() - 1000).toISOString() }
  await writeFile(
    file,
    JSON.stringify({ credential: expired, obtainedAt: Date.now() - 30 * dayMs, server: 'http://server' }),
  )
  const { credential, ready } = await start(t, file, 2)
  await ready
  assert.equal(credential.current?.credential, 'new')
})

test('a credential that the disk does not take counts at once, and is written when there is room', async (t) => {
  const file = join(await temporaryDirectory(t), 'absent', 'credential.json')
  const { credential, ready } = await start(t, file, 0)
  await ready
  assert.equal(credential.current?.credential, 'new')
  await mkdir(dirname(file))
  await until('the file', async () =>
    readFile(file).then(
      () => true,
      () => false,
    ),
  )
  assert.match(await readFile(file, 'utf8'), /"new"/)
})

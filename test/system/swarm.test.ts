import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { readdir } from 'node:fs/promises'
import { resolve } from 'node:path'
import { text } from 'node:stream/consumers'
import { test } from 'node:test'
import type { SwarmSample } from '../../bench/swarm/report.ts'

const root = resolve(import.meta.dirname, '..', '..')
const small = '--hosts 6 --racks 2 --size 8MiB --host-uplink 40Mb --rack-uplink 80Mb'.split(' ')

test('npm run swarm brings a build to real agents behind limited links, those that go away meanwhile too', async () => {
  const { code, stdout, stderr, left } = await runSwarm([...small, '--fault', 'churn', '--json'])
  assert.equal(code, 0, stderr)
  const { samples } = JSON.parse(stdout) as { samples: SwarmSample[] }
  assert.deepEqual(
    samples.map(({ variant }) => variant),
    ['undisturbed', 'churn'],
  )
  for (const { figures, outcome } of samples) {
    assert.equal(figures['unfinished'], 0)
    assert.equal(figures['wrong copies'], 0)
    // What the interfaces say: no less than one copy into each rack, and from the server.
    for (const bytes of outcome.intoRacks) assert.ok(bytes > outcome.bytes)
    assert.ok(outcome.originBytes > outcome.bytes)
    // No link was faster than it may be.
    assert.ok((figures['max'] ?? 0) > outcome.bounds.seconds)
  }
  assert.deepEqual(left, [])
})

test('npm run swarm takes everything down when it is interrupted', async () => {
  const { code, left } = await runSwarm(small, 'publishing')
  assert.equal(code, 130)
  assert.deepEqual(left, [])
})

/** Interrupts it once it says `until`. */
async function runSwarm(args: readonly string[], until?: string) {
  const child = spawn(process.execPath, ['bench/swarm.ts', ...args], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  child.stderr.on('data', (data: Buffer) => {
    if (until !== undefined && data.toString().includes(until)) child.kill('SIGINT')
  })
  const ended = new Promise<number | null>((settle) => child.once('close', settle))
  const [stdout, stderr, code] = await Promise.all([text(child.stdout), text(child.stderr), ended])
  const names = await readdir('/run/netns')
  return { code, stdout, stderr, left: names.filter((name) => name.startsWith(`rackswarm-${child.pid}-`)) }
}

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { appendFile, mkdtemp, readFile, readdir, rm, stat, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import { createChainCheck } from '../../../lib/protocol/audit-chain.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { silentLog } from '../../../lib/runtime/log.ts'
import { ApiError } from '../../../server/registry/api-error.ts'
import type { AuditEntry, AuditLog } from '../../../server/registry/audit-log.ts'
import { openAuditLog } from '../../../server/registry/audit-log.ts'

const entry: AuditEntry = {
  who: { kind: 'api', name: 'ci', credential: 'c1' },
  address: '10.0.0.7',
  action: 'tag.move',
  target: 'web:1',
}

test('a line stands in the file, for its owner alone, before the act is done', async (t) => {
  const directory = await temporaryDirectory(t)
  await using log = await open(directory)
  await log.around(entry, async () => {
    const [line = ''] = (await readFile(join(directory, 'audit.log'), 'utf8')).split('\n')
    const { seq, who, address, action, target, outcome } = JSON.parse(line) as Record<string, unknown>
    assert.deepEqual({ seq, who, address, action, target, outcome }, { seq: 1, ...entry, outcome: 'allowed' })
  })
  assert.equal((await stat(join(directory, 'audit.log'))).mode & 0o777, 0o600)
})

test('an act that fails has a second line, with words that may be shown', async (t) => {
  const directory = await temporaryDirectory(t)
  await using log = await open(directory)
  const fail = (error: Error) =>
    assert.rejects(
      log.around(entry, () => Promise.reject(error)),
      error,
    )
  await fail(new ClientError('x', 'the digest is wrong'))
  await fail(new Error('secret path /var/lib'))
  const lines = (await linesOf(log)).map((line) => JSON.parse(line) as Record<string, unknown>)
  assert.deepEqual(
    lines.map(({ outcome, of, details }) => ({ outcome, of, details })),
    [
      { outcome: 'allowed', of: undefined, details: undefined },
      { outcome: 'failed', of: 1, details: { reason: 'the digest is wrong' } },
      { outcome: 'allowed', of: undefined, details: undefined },
      { outcome: 'failed', of: 3, details: { reason: 'internal error' } },
    ],
  )
})

test('many at once are one chain, which goes on after a restart', async (t) => {
  const directory = await temporaryDirectory(t)
  for (let start = 0; start < 3; start++) {
    await using log = await open(directory)
    await Promise.all(Array.from({ length: 500 }, (_, i) => act(log, `web:${i}`)))
  }
  await using log = await open(directory)
  const lines = await linesOf(log)
  assert.equal(lines.length, 1500)
  assert.deepEqual(faultsOf(lines), [])
})

test('a file that is full is put aside; the oldest go, and pages run through those that are left', async (t) => {
  const directory = await temporaryDirectory(t)
  await using log = await open(directory, { fileMaxBytes: 4096, filesMax: 3 })
  for (let i = 0; i < 200; i++) await act(log, `web:${i}`)
  const files = (await readdir(directory)).sort()
  assert.equal(files.length, 3)
  for (const file of files) assert.ok((await stat(join(directory, file))).size <= 4096, file)
  const lines = await linesOf(log, 7)
  assert.deepEqual(faultsOf(lines), [])
  assert.match(lines.at(-1) ?? '', /"web:199"/)
  assert.ok(lines.length > 20 && lines.length < 60)
})

test('pages begin where they are asked to: after a line, or at a time', async (t) => {
  const clock = { now: 1_800_000_000_000 }
  await using log = await open(await temporaryDirectory(t), {
    fileMaxBytes: 2048,
    filesMax: 100,
    now: () => clock.now,
  })
  for (let i = 1; i <= 50; i++) {
    clock.now += 1000
    await act(log, `web:${i}`)
  }
  const seqOf = (line: string) => (JSON.parse(line) as { seq: number }).seq
  const seqs = async (options: Partial<Parameters<AuditLog['read']>[0]>) =>
    (await log.read({ after: 0, sinceMs: 0, limit: 1000, ...options })).lines.map(seqOf)
  assert.deepEqual((await seqs({ after: 30 })).slice(0, 2), [31, 32])
  assert.deepEqual(await seqs({ after: 50 }), [])
  assert.deepEqual(await seqs({ sinceMs: clock.now - 2000 }), [48, 49, 50])
  assert.deepEqual(await log.read({ after: 49, sinceMs: 0, limit: 1 }).then(({ next }) => next), undefined)
})

test('a line that was spoilt in the file is shown as it is, and hides none of those behind it', async (t) => {
  const directory = await temporaryDirectory(t)
  await using log = await open(directory)
  for (let i = 0; i < 20; i++) await act(log, `web:${i}`)
  const file = join(directory, 'audit.log')
  await writeFile(file, (await readFile(file, 'utf8')).replace('{"seq":10,', '{"no":10,,'))
  for (const limit of [1, 3, 100]) {
    const lines = await linesOf(log, limit)
    assert.equal(lines.length, 20, `in pages of ${limit}`)
    assert.match(faultsOf(lines).join(), /what follows line 9 is no line/)
  }
})

test('whatever a crash leaves behind the last synced line is cut off, told, and the chain goes on', async () => {
  const tail = fc.oneof(
    fc.uint8Array({ minLength: 1, maxLength: 400 }),
    fc.integer({ min: 1, max: 300 }).map((count) => new Uint8Array(count)),
    fc.constant(Buffer.from('{"seq":4,"prev":"')),
    fc.constant(Buffer.concat([Buffer.alloc(100), Buffer.from('","action":"tag.move"}\n')])),
  )
  await fc.assert(
    fc.asyncProperty(tail, async (bytes) => {
      const directory = await mkdtemp(join(tmpdir(), 'rackswarm-audit-'))
      try {
        {
          await using log = await open(directory)
          for (let i = 0; i < 3; i++) await act(log, `web:${i}`)
        }
        await appendFile(join(directory, 'audit.log'), bytes)
        await using log = await open(directory)
        await act(log, 'web:after')
        const lines = await linesOf(log)
        assert.deepEqual(faultsOf(lines), [])
        assert.match(lines[3] ?? '', /"audit.repair".*"bytes":/)
        assert.equal(lines.length, 5)
      } finally {
        await rm(directory, { recursive: true, force: true })
      }
    }),
    { numRuns: 60 },
  )
})

test('a line that is cut at any byte costs that line alone', async (t) => {
  const directory = await temporaryDirectory(t)
  {
    await using log = await open(directory)
    for (let i = 0; i < 2; i++) await act(log, `web:${i}`)
  }
  const file = join(directory, 'audit.log')
  const whole = await readFile(file)
  const first = whole.indexOf(0x0a) + 1
  for (let length = first + 1; length < whole.length; length += 17) {
    await writeFile(file, whole)
    await truncate(file, length)
    await using log = await open(directory)
    const lines = await linesOf(log)
    assert.deepEqual(faultsOf(lines), [], `cut at ${length}`)
    assert.match(lines[1] ?? '', /"seq":2,.*audit\.repair/)
  }
})

test('a crash between putting a file aside and beginning the next one loses nothing', async (t) => {
  const directory = await temporaryDirectory(t)
  {
    await using log = await open(directory, { fileMaxBytes: 1000, filesMax: 10 })
    for (let i = 0; i < 8; i++) await act(log, `web:${i}`)
  }
  await rm(join(directory, 'audit.log'))
  const before = await readdir(directory)
  await using log = await open(directory)
  await act(log, 'web:next')
  const lines = await linesOf(log)
  assert.ok(before.length > 0 && lines.length > 1)
  assert.deepEqual(faultsOf(lines), [])
})

test(
  'on a full disk an act is refused and not done, and the log goes on once there is room',
  { skip: process.getuid?.() !== 0 && 'needs root, to mount a small disk' },
  async (t) => {
    const disk = await temporaryDirectory(t)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', disk])
    using mounted = new DisposableStack()
    mounted.defer(() => execFileSync('umount', [disk]))
    await using log = await open(disk)
    await act(log, 'web:0')
    await writeFile(join(disk, 'filler'), Buffer.alloc(256 * 1024)).catch(() => undefined)
    let done = 0
    let refused: unknown
    for (let i = 0; i < 100 && refused === undefined; i++)
      await log.around(entry, async () => done++).catch((error: unknown) => (refused = error))
    assert.ok(refused instanceof ApiError && refused.status === 507 && refused.code === 'AUDIT_UNAVAILABLE')
    const written = (await linesOf(log)).length
    assert.equal(written, done + 1, 'what has no line was not done')
    assert.ok(log.failures > 0)
    await rm(join(disk, 'filler'))
    await act(log, 'web:1')
    const lines = await linesOf(log)
    assert.equal(lines.length, written + 1)
    assert.deepEqual(faultsOf(lines), [])
  },
)

async function act(log: AuditLog, target: string): Promise<void> {
  await log.around({ ...entry, target }, async () => undefined)
}

async function open(
  directory: string,
  options: { fileMaxBytes?: number; filesMax?: number; now?: () => number } = {},
): Promise<AuditLog> {
  return openAuditLog({
    directory,
    fileMaxBytes: 1024 * 1024,
    filesMax: 4,
    now: Date.now,
    log: silentLog(),
    ...options,
  })
}

async function linesOf(log: AuditLog, limit = 100): Promise<string[]> {
  const lines: string[] = []
  for (let after: number | undefined = 0; after !== undefined;) {
    const page = await log.read({ after, sinceMs: 0, limit })
    lines.push(...page.lines)
    after = page.next
  }
  return lines
}

function faultsOf(lines: readonly string[]): string[] {
  const check = createChainCheck()
  return lines.flatMap((line) => check.follow(line) ?? [])
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-audit-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

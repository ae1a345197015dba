import assert from 'node:assert/strict'
import { test } from 'node:test'
import { createOutput, formatBytes, formatDuration } from '../../cli/output.ts'

function start({ tty = false, env = {}, json = false, quiet = false, colour = true } = {}) {
  const written = { stdout: '', stderr: '' }
  const stream = (name: 'stdout' | 'stderr') => ({
    isTTY: tty,
    write: (text: string) => (written[name] += text),
  })
  const out = createOutput({ stdout: stream('stdout'), stderr: stream('stderr'), env, json, quiet, colour })
  return { out, written }
}

test('colour is for terminals whose user wants it', () => {
  const painted = (env: Record<string, string>, tty = true) => start({ tty, env }).out.paint('red', 'x')
  assert.match(painted({}), /\u001B\[31mx/)
  assert.equal(painted({ NO_COLOR: '1' }), 'x')
  assert.match(painted({ NO_COLOR: '' }), /\u001B/, 'an empty NO_COLOR means nothing (no-color.org)')
  assert.equal(painted({ TERM: 'dumb' }), 'x')
  assert.equal(painted({}, false), 'x')
  assert.match(painted({ FORCE_COLOR: '1' }, false), /\u001B/)
  assert.equal(painted({ FORCE_COLOR: '1', NO_COLOR: '1' }), 'x')
  assert.match(painted({ CLICOLOR_FORCE: '1' }, false), /\u001B/)
  assert.equal(start({ tty: true, colour: false }).out.paint('red', 'x'), 'x', '--no-color')
})

test('progress is drawn over at a terminal, and neither in a pipe, nor in CI, nor with --quiet', () => {
  const drawn = (options: Parameters<typeof start>[0]) => {
    const { out, written } = start(options)
    out.progress('40%')
    out.progress('50%')
    out.note('done')
    return written.stderr
  }
  assert.equal(drawn({ tty: true }), '40%\r\u001B[2K50%\r\u001B[2Kdone\n')
  assert.equal(drawn({}), 'done\n')
  assert.equal(drawn({ tty: true, env: { CI: 'true' } }), 'done\n')
  assert.equal(drawn({ tty: true, quiet: true }), '')
})

test('results alone go to stdout: a line of JSON, an aligned table, or tabs for a pipe', () => {
  const rows = [
    ['web', '1.2.3'],
    ['database', '1'],
  ]
  const json = start({ json: true })
  json.out.result({ a: 1 }, () => 'human')
  json.out.done({ b: 2 }, 'done')
  assert.deepEqual(json.written, { stdout: '{"a":1}\n{"b":2}\n', stderr: '' })
  const human = start()
  human.out.done({ b: 2 }, 'done')
  assert.deepEqual(human.written, { stdout: '', stderr: 'done\n' })
  assert.equal(
    start({ tty: true }).out.table(['NAME', 'TAG'], rows),
    'NAME      TAG\nweb       1.2.3\ndatabase  1\n',
  )
  assert.equal(start().out.table(['NAME', 'TAG'], rows), 'web\t1.2.3\ndatabase\t1\n')
})

test('bytes and times are told as people read them', () => {
  assert.deepEqual([0, 999, 1024, 1536, 2 ** 30, 250 * 2 ** 20].map(formatBytes), [
    '0 B',
    '999 B',
    '1.0 KiB',
    '1.5 KiB',
    '1.0 GiB',
    '250 MiB',
  ])
  assert.deepEqual([0, 4200, 185_000].map(formatDuration), ['0.0 s', '4.2 s', '3m 05s'])
})

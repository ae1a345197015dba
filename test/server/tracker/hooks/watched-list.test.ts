import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { appendFile, mkdir, mkdtemp, open, rename, rm, symlink, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { setImmediate as turn, setTimeout as pause } from 'node:timers/promises'
import type { Logger } from '../../../../lib/runtime/log.ts'
import { silentLog } from '../../../../lib/runtime/log.ts'
import { networkApproval } from '../../../../server/tracker/hooks/network-approval.ts'
import { torrentApproval } from '../../../../server/tracker/hooks/torrent-approval.ts'
import type { EntryList, WatchedList } from '../../../../server/tracker/hooks/watched-list.ts'
import { listBytesMax, watchList } from '../../../../server/tracker/hooks/watched-list.ts'
import { until } from '../../../support/until.ts'
import { announceOf, answer, createHook } from './support.ts'

interface Words extends EntryList<string> {
  readonly words: readonly string[]
}

const format = {
  entriesMax: 1000,
  lineBytesMin: 2,
  parse: (text: string) => {
    if (!/^[a-z]+$/.test(text)) throw new Error(`${JSON.stringify(text)} is no word`)
    return text
  },
  create: (): Words => {
    const words: string[] = []
    return {
      words,
      get size() {
        return words.length
      },
      add: (word) => {
        words.push(word)
      },
    }
  },
}

test('an edit in place counts', async (t) => {
  const { file, list } = await startList(t, 'one\n')
  assert.deepEqual(list.current.words, ['one'])
  const before = list.loadedAtMs
  await writeFile(file, 'two\nthree\n')
  await until('the new list is in force', () => list.current.words.join() === 'two,three')
  assert.ok(list.loadedAtMs >= before)
  await appendFile(file, 'four\n')
  await until('the longer list is in force', () => list.current.words.join() === 'two,three,four')
  await truncate(file)
  await until('the empty list is in force', () => list.current.size === 0)
})

test('a rename over the file counts', async (t) => {
  const { file, list, directory } = await startList(t, 'one\n')
  await writeFile(join(directory, 'next'), 'two\n')
  await rename(join(directory, 'next'), file)
  await until('the new list is in force', () => list.current.words.join() === 'two')
})

test('a swapped symbolic link counts, as config maps do it', async (t) => {
  const directory = await makeDirectory(t)
  await mkdir(join(directory, 'v1'))
  await mkdir(join(directory, 'v2'))
  await writeFile(join(directory, 'v1', 'list'), 'one\n')
  await writeFile(join(directory, 'v2', 'list'), 'two\n')
  await symlink('v1', join(directory, '..data'))
  await symlink('..data/list', join(directory, 'list'))
  const list = await follow(t, join(directory, 'list'))
  await symlink('v2', join(directory, '..tmp'))
  await rename(join(directory, '..tmp'), join(directory, '..data'))
  await until('the new list is in force', () => list.current.words.join() === 'two')
})

test('a change that no event tells of is found by looking', async (t) => {
  const outside = await makeDirectory(t)
  const directory = await makeDirectory(t)
  await writeFile(join(outside, 'real'), 'one\n')
  // Events come from the directory of the name, and the change is elsewhere.
  await symlink(join(outside, 'real'), join(directory, 'list'))
  const list = await follow(t, join(directory, 'list'), { pollMs: 50 })
  await writeFile(join(outside, 'real'), 'two\n')
  await until('the new list is in force', () => list.current.words.join() === 'two')
})

test('a bad line keeps the list before, and the log says which line', async (t) => {
  const { log, entries } = recordingLog()
  const { file, list } = await startList(t, 'one\n', { log })
  await writeFile(file, 'two\n# fine\nTHREE\n')
  await until('the fault is seen', () => list.fault !== undefined)
  assert.deepEqual(list.current.words, ['one'])
  const message = `Cannot use list ${file}:\n  ${file}:3: "THREE" is no word`
  assert.equal(list.fault, message)
  assert.deepEqual(
    entries.filter(({ level }) => level === 'error'),
    [
      {
        level: 'error',
        fields: { file, fault: message },
        text: 'list not loaded; the one before stays in force',
      },
    ],
  )
  await writeFile(file, 'two\nthree\n')
  await until('the fault is gone', () => list.fault === undefined)
  assert.deepEqual(list.current.words, ['two', 'three'])
})

test('a file that is removed keeps the list before, is logged once, and counts again when it is back', async (t) => {
  const { log, entries } = recordingLog()
  let looks = 0
  const now = () => {
    looks++
    return Date.now()
  }
  const { file, list, directory } = await startList(t, 'one\n', { log, now, pollMs: 20, settleMs: 5 })
  await rename(file, join(directory, 'away'))
  await until('the fault is seen', () => list.fault !== undefined)
  assert.match(list.fault ?? '', /^Cannot read list .*: ENOENT/)
  assert.deepEqual(list.current.words, ['one'])
  const before = looks
  await until('it looks again and again', () => looks > before + 5)
  assert.equal(entries.filter(({ level }) => level === 'error').length, 1)
  await rename(join(directory, 'away'), file)
  await until('the fault is gone', () => list.fault === undefined)
  assert.deepEqual(list.current.words, ['one'])
})

test('a file that is being written counts when it stands still', async (t) => {
  const { file, list } = await startList(t, 'one\n', { settleMs: 400 })
  const seen = new Set<string>()
  const writer = await open(file, 'w')
  // A writer that takes longer than one look at the file, and pauses for less.
  for (let i = 0; i < 8; i++) {
    await writer.write('two\n')
    seen.add(list.current.words.join())
    await pause(80)
  }
  await writer.close()
  await until('the longest list is in force', () => {
    seen.add(list.current.words.join())
    return list.current.size === 8
  })
  assert.deepEqual([...seen], ['one', Array.from({ length: 8 }, () => 'two').join()])
  assert.equal(list.fault, undefined)
})

test('at the start, a bad file is an error that names up to ten lines, and a file that is missing or too large is one too', async (t) => {
  const directory = await makeDirectory(t)
  const file = join(directory, 'list')
  await assert.rejects(follow(t, file), /^Error: Cannot read list .*list: ENOENT/)
  await assert.rejects(follow(t, directory), /it is not a file/)
  await writeFile(file, `good\n${'BAD\n'.repeat(20)}`)
  await assert.rejects(follow(t, file), (error: Error) => {
    assert.deepEqual(
      error.message.split('\n').slice(1),
      Array.from({ length: 10 }, (_, i) => `  ${file}:${i + 2}: "BAD" is no word`),
    )
    return true
  })
  await writeFile(file, `good\n${'x'.repeat(70_000)}\n`)
  await assert.rejects(follow(t, file), new RegExp(`${file}:2: the line has more than 65535 bytes`))
  await writeFile(file, 'word\n'.repeat(1001))
  await assert.rejects(follow(t, file), new RegExp(`${file}:1001: there are more than 1000 entries`))
  // Sparse: it takes no room.
  await truncate(file, listBytesMax + 1)
  await assert.rejects(follow(t, file), /has 268435457 bytes, and a list has at most 268435456/)
})

test('a list that is no longer wanted is no longer followed', async (t) => {
  const { file, list } = await startList(t, 'one\n')
  const other = await follow(t, file)
  await list[Symbol.asyncDispose]()
  await writeFile(file, 'two\n')
  await until('the new list is in force', () => other.current.words.join() === 'two')
  assert.deepEqual(list.current.words, ['one'])
})

test('a large list is read in slices, between which others have their turn', async (t) => {
  const directory = await makeDirectory(t)
  const hashOf = (text: string) => createHash('sha1').update(text).digest('hex')
  const hashes = Array.from({ length: 200_000 }, (_, i) => hashOf(`listed ${i}`))
  await writeFile(join(directory, 'torrents'), hashes.join('\n'))
  const torrents = await withOthersRunning(() =>
    createHook(t, torrentApproval, { whitelist_file: join(directory, 'torrents') }),
  )
  assert.equal(torrents.list.entries, hashes.length)
  for (let i = 0; i < hashes.length; i += 1000) {
    assert.equal(
      answer(() => torrents.announce?.(announceOf({ infoHash: hashes[i] ?? '' }))),
      'ok',
    )
    const infoHash = hashOf(`other ${i}`)
    assert.equal(
      answer(() => torrents.announce?.(announceOf({ infoHash }))),
      'unapproved torrent',
    )
  }

  // Short lines that take long to read: thousands of them in each piece of the file.
  const addresses = Array.from({ length: 50_000 }, (_, i) => `10.${i >> 16}.${(i >> 8) & 255}.${i & 255}`)
  await writeFile(join(directory, 'networks'), addresses.join('\n'))
  const networks = await withOthersRunning(() =>
    createHook(t, networkApproval, { whitelist_file: join(directory, 'networks') }),
  )
  assert.equal(networks.list.entries, addresses.length)
})

/** Runs something that must leave others their turns: nineteen of twenty within 10 ms of processor time. */
async function withOthersRunning<Result>(work: () => Promise<Result>): Promise<Result> {
  const busyMs: number[] = []
  const state = { done: false }
  const spentMs = () => {
    const { user, system } = process.threadCpuUsage()
    return (user + system) / 1000
  }
  const others = (async () => {
    for (let last = spentMs(); !state.done; last = spentMs()) {
      await turn()
      // Turns in which nothing was done, since a read was waited for, say nothing.
      if (spentMs() - last > 0.5) busyMs.push(spentMs() - last)
    }
  })()
  try {
    return await work()
  } finally {
    state.done = true
    await others
    const slow = busyMs.filter((ms) => ms > 10)
    // The odd one may meet the collector.
    assert.ok(
      busyMs.length > 20 && slow.length <= busyMs.length / 20,
      `of ${busyMs.length} turns: ${slow.join()} ms`,
    )
  }
}

type Options = Partial<Parameters<typeof watchList<string, Words>>[0]>

async function startList(t: TestContext, content: string, options: Options = {}) {
  const directory = await makeDirectory(t)
  const file = join(directory, 'list')
  await writeFile(file, content)
  return { directory, file, list: await follow(t, file, options) }
}

/** Follows a file by events alone, unless `options` has a `pollMs`. */
async function follow(t: TestContext, file: string, options: Options = {}): Promise<WatchedList<Words>> {
  const list = await watchList({
    file,
    format,
    log: silentLog(),
    now: Date.now,
    pollMs: 3_600_000,
    settleMs: 20,
    ...options,
  })
  t.after(() => list[Symbol.asyncDispose]())
  return list
}

async function makeDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'watched-list-'))
  t.after(() => rm(directory, { recursive: true }))
  return directory
}

function recordingLog() {
  const entries: { level: string; fields: unknown; text: string }[] = []
  const record = (level: string) => (fields: unknown, text: string) => {
    entries.push({ level, fields, text })
  }
  const log = Object.assign(Object.create(silentLog()) as Logger, {
    info: record('info'),
    warn: record('warn'),
    error: record('error'),
  })
  return { log, entries }
}

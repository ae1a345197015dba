import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import type { ContentDigest } from '../../../../lib/protocol/digest.ts'
import { digestHex, digestOf, parseContentDigest } from '../../../../lib/protocol/digest.ts'
import { swarmLengthMin } from '../../../../lib/protocol/metainfo.ts'
import type { CrashState, Journal } from './crash-states.ts'
import { createJournal } from './crash-states.ts'
import type { Fact } from './inspect.ts'
import { inspect, pushOnto, startStore } from './inspect.ts'
import type { Step } from './strace.ts'
import { parseTrace } from './strace.ts'
import type { TracedServer } from './traced-server.ts'
import { startTracedServer } from './traced-server.ts'

/** Where the store keeps what is tested here; the rest of the data directory is other people's. */
const parts = ['blobs', 'uploads', 'infohashes', 'repositories']
const statesMax = 40
const imageType = 'application/vnd.oci.image.manifest.v1+json'
/** The same sample at each run, so that what fails once fails again. */
const seed = 20_261_129
/** Syncs by what was asked for and what was synced: whether something is lost when one of them is left out. */
const needed = new Map<string, boolean>()

test('what a push, a resumed upload, a mount, a push of the same again, a tag that moves and a deletion acknowledged is there after a power failure at any moment', async (t) => {
  const directory = await temporaryDirectory(t)
  const data = join(directory, 'data')
  await record(directory, data, () => Promise.resolve())
  for (const part of parts) await rm(join(data, part), { recursive: true })
  // As a server leaves it that was killed after it had made its directories, and before it could sync them.
  const before: Step[] = []
  for (const path of ['blobs', 'blobs/sha256', 'uploads', 'infohashes', 'repositories']) {
    await mkdir(join(data, path), { recursive: true })
    before.push({ kind: 'mkdir', path: join(data, path) })
  }
  const layer = randomBytes(swarmLengthMin + 1000)
  const config = Buffer.from('{"os":"linux"}')
  const resumed = randomBytes(swarmLengthMin + 2000)
  const story = await record(directory, data, async (client) => {
    const { push, send, tell } = client
    await send('blob', 'POST', `/v2/web/blobs/uploads/?length=${layer.length}`, 202)
    await send('blob', 'PATCH', client.location(), 202, { body: layer })
    await send('blob', 'PUT', `${client.location()}?digest=${digestOf(layer)}`, 201)
    tell({ kind: 'blob', repository: 'web', digest: digestOf(layer) })
    await push('web', config)
    const sha512 = parseContentDigest(`sha512:${createHash('sha512').update(config).digest('hex')}`)
    await push('web', config, sha512)

    const first = manifest({ layer, config, round: 1 })
    await client.putManifest('web', 'v1', first)
    tell({ kind: 'manifest', repository: 'web', digest: digestOf(first) })
    const pointed = tell({ kind: 'tag', repository: 'web', tag: 'v1', digest: digestOf(first) })

    await send('mount', 'POST', `/v2/other/blobs/uploads/?mount=${digestOf(layer)}&from=web`, 201)
    tell({ kind: 'blob', repository: 'other', digest: digestOf(layer) })

    await send('blob', 'POST', '/v2/other/blobs/uploads/', 202)
    await send('blob', 'PATCH', client.location(), 202, { body: resumed.subarray(0, 100_000) })
    await send('blob', 'GET', client.location(), 204)
    await send('blob', 'PUT', `${client.location()}?digest=${digestOf(resumed)}`, 201, {
      body: resumed.subarray(100_000),
      headers: { 'content-range': `100000-${resumed.length - 1}` },
    })
    tell({ kind: 'blob', repository: 'other', digest: digestOf(resumed) })
    await push('third', layer)

    const signature = manifest({ layer, config, round: 2, subject: first })
    await client.putManifest('web', 'signature', signature)
    tell({ kind: 'referrer', repository: 'web', subject: digestOf(first), digest: digestOf(signature) })
    const tagged = tell({ kind: 'tag', repository: 'web', tag: 'signature', digest: digestOf(signature) })
    const second = manifest({ layer, config, round: 3 })
    client.untell(pointed)
    await client.putManifest('web', 'v1', second)
    const moved = tell({ kind: 'tag', repository: 'web', tag: 'v1', digest: digestOf(second) })
    client.untell(tagged)
    await send('delete', 'DELETE', '/v2/web/manifests/signature', 202)
    tell({ kind: 'no tag', repository: 'web', tag: 'signature' })
    client.untell(moved)
    await send('delete', 'DELETE', `/v2/web/manifests/${digestOf(second)}`, 202)
    tell({ kind: 'no manifest', repository: 'web', digest: digestOf(second) })
    tell({ kind: 'no tag', repository: 'web', tag: 'v1' })
  })
  await survives(t, { before, ...story }, data, layer)
})

test('what a killed server had not synced, and the next one found there, is on disk before anything that rests on it is acknowledged', async (t) => {
  const directory = await temporaryDirectory(t)
  const data = join(directory, 'data')
  const linked = Buffer.from('a blob whose link was not synced')
  const renamed = randomBytes(swarmLengthMin + 3000)
  const attached = (round: number) =>
    Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        layers: [],
        subject: descriptor(linked),
        annotations: { round: String(round) },
      }),
    )
  await record(directory, data, () => Promise.resolve())
  {
    await using store = await startStore(data)
    for (const [repository, bytes] of [
      ['early', linked],
      ['gone', renamed],
    ] as const) {
      const upload = await store.startUpload(repository, bytes.length)
      await upload.append(once(bytes), new AbortController().signal)
      await upload.commit(digestOf(bytes))
    }
    await store.putManifest('old', {
      digest: digestOf(attached(1)),
      mediaType: imageType,
      bytes: attached(1),
    })
  }
  await rm(join(data, 'repositories', 'gone'), { recursive: true })
  // From before referrers were marked.
  await rm(join(data, 'repositories', 'old', '_referrers'), { recursive: true })
  await mkdir(join(data, 'repositories', 'half', '_blobs'), { recursive: true })
  // All of it is on disk, but a repository that is empty yet, the link of one blob and the name of the other.
  const loose = [
    join(data, 'repositories', 'half'),
    join(data, 'repositories', 'early', '_blobs', digestHex(digestOf(linked))),
    join(data, 'blobs', 'sha256', digestHex(digestOf(renamed)).slice(0, 2), digestHex(digestOf(renamed))),
  ]
  const before = await asFound(data, loose)
  const story = await record(directory, data, async (client) => {
    await client.send('manifest', 'HEAD', `/v2/early/blobs/${digestOf(linked)}`, 200)
    const index = Buffer.from(JSON.stringify({ schemaVersion: 2, manifests: [] }))
    await client.putManifest('half', 'v1', index)
    client.tell({ kind: 'tag', repository: 'half', tag: 'v1', digest: digestOf(index) })
    const only = Buffer.from(
      JSON.stringify({ schemaVersion: 2, mediaType: imageType, config: descriptor(linked), layers: [] }),
    )
    await client.putManifest('early', 'v1', only)
    client.tell({ kind: 'tag', repository: 'early', tag: 'v1', digest: digestOf(only) })
    client.tell({ kind: 'blob', repository: 'early', digest: digestOf(linked) })
    await client.push('late', renamed)
    await client.putManifest('old', 'second', attached(2))
    for (const round of [1, 2])
      client.tell({
        kind: 'referrer',
        repository: 'old',
        subject: digestOf(linked),
        digest: digestOf(attached(round)),
      })
  })
  await survives(t, { before, ...story }, data, renamed)
})

test('every sync is there for a reason: without it something that was acknowledged is lost', (t) => {
  t.diagnostic([...needed.keys()].sort().join('\n'))
  assert.ok(needed.size > 20)
  // At the start the audit log syncs where it lies; nothing of the store rests on that.
  const idle = [...needed].filter(([place, red]) => !red && place !== 'start: ').map(([place]) => place)
  assert.deepEqual(idle, [], 'nothing is lost without these syncs')
})

test('strace: names of descriptors, escapes, calls that overlap, and what is deleted', () => {
  const trace = [
    String.raw`10 openat(AT_FDCWD</>, "\x2f\x64\x2f\x61", O_WRONLY|O_CREAT|O_EXCL, 0644) = 5<\x2f\x64\x2f\x61>`,
    String.raw`10 write(5</d/a>, "\x00,\x22", 3 <unfinished ...>`,
    '11 fsync(6</d> <unfinished ...>',
    String.raw`12 writev(7<socket:[1]>, [{iov_base="HTTP\57", iov_len=5}, {iov_base="1.1 201\r\n", iov_len=9}], 2) = 14`,
    '10 <... write resumed>) = 3',
    '11 <... fsync resumed>) = 0',
    '12 unlinkat(8</d>, "a", 0) = 0',
    '12 write(5</d/a>(deleted), "b", 1) = 1',
    '12 rename("/d/x", "/d/y") = -1 ENOENT (No such file or directory)',
    '12 pwrite64(9</d/c>, "d", 1, 4096) = 1',
    '12 +++ killed by SIGKILL +++',
  ].join('\n')
  assert.deepEqual(parseTrace(trace), [
    { kind: 'create', path: '/d/a' },
    { kind: 'sync', path: '/d' },
    { kind: 'send', bytes: Buffer.from('HTTP/1.1 201\r\n') },
    { kind: 'write', path: '/d/a', at: undefined, bytes: Buffer.from('\0,"') },
    { kind: 'remove', path: '/d/a' },
    { kind: 'write', path: '/d/c', at: 4096, bytes: Buffer.from('d') },
  ])
})

test('strace: what is written comes back whatever the bytes', () => {
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 1, maxLength: 200 }), (bytes) => {
      const text = [...bytes].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('')
      const [step] = parseTrace(`1 write(3</a>, "${text}", ${bytes.length}) = ${bytes.length}`)
      assert.deepEqual(step, { kind: 'write', path: '/a', at: undefined, bytes: Buffer.from(bytes) })
    }),
  )
})

test('crash states: nothing that was synced is lost, and of the rest everything may be', () => {
  const write = (path: string, text: string): Step => ({
    kind: 'write',
    path,
    at: undefined,
    bytes: Buffer.from(text),
  })
  const steps: Step[] = [
    { kind: 'create', path: '/r/a' },
    write('/r/a', 'one'),
    { kind: 'sync', path: '/r/a' },
    { kind: 'mkdir', path: '/r/d' },
    { kind: 'rename', from: '/r/a', to: '/r/d/b' },
    write('/r/d/b', 'two'),
  ]
  const statesOf = (journal: Journal, at: number) =>
    [...journal.statesAt(at, { random: Math.random, statesMax: 1000 })].map(({ entries }) =>
      [...entries].map(([path, content]) => `${path}=${content?.toString() ?? 'directory'}`).join(' '),
    )
  const unsynced = new Set(statesOf(createJournal(steps, '/r'), steps.length))
  for (const state of [
    '',
    'a=one',
    'a=one d=directory',
    'd=directory d/b=one',
    'd=directory d/b=onetwo',
    'd=directory d/b=one\0\0\0',
  ])
    assert.ok(unsynced.has(state), state)
  const synced = [
    ...steps,
    { kind: 'sync' as const, path: '/r/d' },
    { kind: 'sync' as const, path: '/r' },
    { kind: 'sync' as const, path: '/r/d/b' },
  ]
  assert.deepEqual(
    new Set(statesOf(createJournal(synced, '/r'), synced.length)),
    new Set(['d=directory d/b=onetwo']),
  )
})

interface Story {
  readonly steps: readonly Step[]
  /** What each request was about, in order. */
  readonly labels: readonly string[]
  readonly facts: readonly TimedFact[]
}

/** Holds once `from` requests are answered, and while no more than `until` are. */
interface TimedFact {
  readonly fact: Fact
  readonly from: number
  until: number
}

type Client = Awaited<ReturnType<typeof createClient>>

/** Lets a client talk to a server under strace. @returns what the server did and what it promised */
async function record(
  directory: string,
  data: string,
  talk: (client: Client) => Promise<void>,
): Promise<Story> {
  await using server = await startTracedServer(directory, data)
  const client = createClient(server)
  await talk(client)
  const steps = await server.finish()
  const { labels, facts } = client
  const ours = steps.filter(
    (step) => step.kind === 'send' || pathsOf(step).some((path) => isPart(path, data)),
  )
  return { steps: ours, labels, facts }
}

function createClient(server: TracedServer) {
  const labels: string[] = []
  const facts: TimedFact[] = []
  let location = ''
  const send = async (
    label: string,
    method: string,
    path: string,
    status: number,
    { body, headers }: { body?: Buffer; headers?: Record<string, string> } = {},
  ) => {
    labels.push(label)
    const response = await fetch(new URL(path, server.url), {
      method,
      headers: { ...server.headers, ...headers },
      ...(body && { body: new Uint8Array(body) }),
    })
    assert.equal(response.status, status, `${method} ${path}: ${await response.text()}`)
    location = response.headers.get('location') ?? location
  }
  const tell = (fact: Fact): TimedFact => {
    const timed = { fact, from: labels.length, until: Infinity }
    facts.push(timed)
    return timed
  }
  return {
    labels,
    facts,
    location: () => location,
    send,
    /** From here on the client counts on it. */
    tell,
    /** The next request may change it. */
    untell: (timed: TimedFact) => {
      timed.until = labels.length
    },
    push: async (repository: string, bytes: Buffer, digest: ContentDigest = digestOf(bytes)) => {
      await send('blob', 'POST', `/v2/${repository}/blobs/uploads/?digest=${digest}`, 201, { body: bytes })
      tell({ kind: 'blob', repository, digest })
    },
    putManifest: async (repository: string, tag: string, bytes: Buffer) => {
      const headers = { 'content-type': imageType }
      await send('manifest', 'PUT', `/v2/${repository}/manifests/${tag}`, 201, { body: bytes, headers })
    },
  }
}

/** Goes through the crash states of a story, and then through those of the story without each of its syncs. */
async function survives(
  t: TestContext,
  { before, steps: own, labels, facts }: Story & { before: readonly Step[] },
  data: string,
  blob: Buffer,
): Promise<void> {
  const steps = [...before, ...own]
  const journal = createJournal(steps, data)
  const answered = countAnswers(steps)
  assert.ok((answered.at(-1) ?? 0) >= labels.length, 'each request has its answer in the journal')
  // The first request of each story changes nothing that is synced.
  const firstAnswer = steps.findIndex(isAnswer)
  const verdicts = new Map<string, Promise<string[]>>()
  let states = 0
  const faultsOf = async (state: CrashState, at: number): Promise<string[]> => {
    const expected = factsAt(facts, steps, answered, at)
    const key = `${state.id} ${JSON.stringify(expected)}`
    const known = verdicts.get(key)
    if (known) return known
    states++
    const verdict = inspect(state, expected)
    verdicts.set(key, verdict)
    return verdict
  }
  const moments = steps.flatMap((step, at) =>
    at < before.length ? [] : step.kind === 'sync' ? [at] : isAnswer(step) ? [at + 1] : [],
  )

  const pushedOnto = new Set<string>()
  for (const at of [...moments, steps.length]) {
    const random = seeded(seed + at)
    let first = true
    for (const state of journal.statesAt(at, { random, statesMax })) {
      assert.deepEqual(await faultsOf(state, at), [], `power fails before step ${at}: ${describe(steps, at)}`)
      if (first && !pushedOnto.has(state.id))
        assert.deepEqual(await pushOnto(state, blob, digestOf(blob)), [])
      pushedOnto.add(state.id)
      first = false
    }
  }
  t.diagnostic(
    `pushed onto ${pushedOnto.size}; ${states} states at ${moments.length} moments, none with a fault`,
  )

  // And without each of the syncs, some state has a fault.
  for (const [skip, step] of steps.entries()) {
    if (step.kind !== 'sync' || skip < before.length) continue
    const label = skip < firstAnswer ? 'start' : (labels[answered[skip] ?? 0] ?? 'end')
    const place = `${label}: ${anonymous(step.path, data)}`
    if (needed.get(place) === true) continue
    needed.set(place, await fails(skip))
  }

  async function fails(skip: number): Promise<boolean> {
    for (const at of [...moments, steps.length].filter((moment) => moment > skip))
      for (const state of journal.statesAt(at, { random: seeded(seed + at), statesMax, skip }))
        if ((await faultsOf(state, at)).length > 0) return true
    return false
  }
}

/** How many answers the journal has before each step, and at its end. */
function countAnswers(steps: readonly Step[]): number[] {
  let count = 0
  return [...steps.map((step) => (isAnswer(step) ? count++ : count)), count]
}

function isAnswer(step: Step): boolean {
  return step.kind === 'send' && step.bytes.subarray(0, 9).toString('latin1') === 'HTTP/1.1 '
}

/** While the next request may be under way, what it changes is not counted on. */
function factsAt(
  facts: readonly TimedFact[],
  steps: readonly Step[],
  answered: readonly number[],
  at: number,
): Fact[] {
  const count = answered[at] ?? 0
  const justAnswered = at > 0 && isAnswer(steps[at - 1] ?? { kind: 'other', call: '', paths: [] })
  return facts
    .filter(({ from, until }) => from <= count && (count < until || (count === until && justAnswered)))
    .map(({ fact }) => fact)
}

function describe(steps: readonly Step[], at: number): string {
  return steps
    .slice(Math.max(0, at - 5), at + 1)
    .map((step) => `${step.kind} ${pathsOf(step).join(' ')}`)
    .join('\n')
}

function pathsOf(step: Step): readonly string[] {
  switch (step.kind) {
    case 'rename':
      return [step.from, step.to]
    case 'send':
      return []
    case 'other':
      return step.paths
    default:
      return [step.path]
  }
}

function isPart(path: string, data: string): boolean {
  return (
    path === data || parts.some((part) => path === join(data, part) || path.startsWith(join(data, part, '/')))
  )
}

/** The path with what differs from run to run left out. */
function anonymous(path: string, data: string): string {
  return path
    .slice(data.length)
    .replace(/\/\.[^/]+\.tmp$/, '/FILE')
    .replace(/[0-9a-f]{8}-[0-9a-f-]{27}/, 'UPLOAD')
    .replaceAll(/(?<=\/)([0-9a-f]{128}|[0-9a-f]{64}|[0-9a-f]{40})(?=\/|$)/g, 'HEX')
    .replace(/(?<=sha\d{3}\/)[0-9a-f]{2}(?=\/|$)/, 'XX')
    .replace(/(?<=^\/repositories\/)[^/]+/, 'NAME')
}

/** What is in a directory, as steps that made it and synced all of it but the names in `loose`. */
async function asFound(root: string, loose: readonly string[]): Promise<Step[]> {
  const made: Step[] = []
  const late: Step[] = []
  const visit = async (directory: string, into: Step[]) => {
    const later: string[] = []
    for (const entry of await readdir(directory, { withFileTypes: true })) {
      const path = join(directory, entry.name)
      if (!isPart(path, root)) continue
      if (loose.includes(path)) {
        later.push(path)
        continue
      }
      await add(path, entry.isDirectory(), into)
    }
    into.push({ kind: 'sync', path: directory })
    for (const path of later) await add(path, !(await isFile(path)), late)
  }
  const add = async (path: string, isDirectory: boolean, into: Step[]) => {
    into.push({ kind: isDirectory ? 'mkdir' : 'create', path })
    if (isDirectory) await visit(path, into)
    else into.push({ kind: 'write', path, at: 0, bytes: await readFile(path) }, { kind: 'sync', path })
  }
  await visit(root, made)
  return [...made, ...late]
}

async function isFile(path: string): Promise<boolean> {
  return readdir(path).then(
    () => false,
    () => true,
  )
}

function descriptor(bytes: Buffer, mediaType = 'application/octet-stream') {
  return { mediaType, digest: digestOf(bytes), size: bytes.length }
}

function manifest({
  layer,
  config,
  round,
  subject,
}: {
  layer: Buffer
  config: Buffer
  round: number
  subject?: Buffer
}): Buffer {
  return Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: imageType,
      config: descriptor(config),
      layers: [descriptor(layer)],
      ...(subject && { subject: descriptor(subject, imageType) }),
      annotations: { round: String(round) },
    }),
  )
}

async function* once(bytes: Buffer): AsyncGenerator<Uint8Array> {
  yield await Promise.resolve(bytes)
}

/** mulberry32: a state of 32 bits, good enough to choose with. */
function seeded(from: number): () => number {
  let state = from >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-power-loss-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, lstat, mkdir, mkdtemp, readFile, readdir, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import fc from 'fast-check'
import type { MirrorSetup } from '../../../agent/mirror/client-files.ts'
import { clientFiles, mirrorClients } from '../../../agent/mirror/client-files.ts'
import { openInstallation } from '../../../agent/mirror/installation.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { bin } from '../../support/fleet.ts'
import { temporaryDirectory } from '../engine/fixtures.ts'

const setup: MirrorSetup = {
  mirrorUrl: 'http://127.0.0.1:5052',
  registries: [
    { host: 'registry.example', plaintext: false },
    { host: '127.0.0.1:6969', plaintext: true },
    { host: 'docker.io', plaintext: false },
  ],
  resolve: true,
}
const allFiles = mirrorClients.flatMap((client) => clientFiles(client, setup, () => false))
const hosts = '/etc/containerd/certs.d/registry.example/hosts.toml'

test('install, install, uninstall leaves any files as they were, byte for byte, and what cannot be built upon at once', async () => {
  const anyContent = fc.oneof(
    fc.constant(undefined),
    fc.uint8Array({ maxLength: 60 }).map((bytes) => Buffer.from(bytes)),
    fc
      .array(
        fc.constantFrom(
          'server = "https://registry.example"',
          '[host."https://other.example"]',
          '  capabilities = ["pull"]',
          '  [host."https://other.example".header]',
          '# [host."x"]',
          '{"registry-mirrors": ["https://other.example"], "debug": true}',
          '{}',
          '',
          '\u00fc',
        ),
        { maxLength: 6 },
      )
      .chain((lines) => fc.constantFrom('\n', '\r\n').map((end) => Buffer.from(lines.join(end)))),
  )
  const files = fc.record({
    contents: fc.array(anyContent, { minLength: allFiles.length, maxLength: allFiles.length }),
    mode: fc.constantFrom(0o644, 0o600),
  })
  let installed = 0
  await fc.assert(
    fc.asyncProperty(files, async ({ contents, mode }) => {
      const root = await mkdtemp(join(tmpdir(), 'rackswarm-install-'))
      try {
        for (const [i, content] of contents.entries())
          if (content) await put(root, allFiles[i]?.path ?? '', content, mode)
        const before = await snapshot(root)
        try {
          await (await openInstallation(root)).install(mirrorClients, allFiles, { force: false })
          const first = await snapshot(root)
          assert.notDeepEqual(first, before)
          const again = await (
            await openInstallation(root)
          ).install(mirrorClients, allFiles, { force: false })
          assert.ok(again.every(({ did }) => did === 'unchanged'))
          assert.deepEqual(await snapshot(root), first)
          await (await openInstallation(root)).uninstall(mirrorClients, { force: false })
          installed++
        } catch (error) {
          if (!(error instanceof ClientError)) throw error
        }
        assert.deepEqual(await snapshot(root), before)
      } finally {
        await rm(root, { recursive: true })
      }
    }),
    { numRuns: 60 },
  )
  assert.ok(installed > 10, `${installed} of 60 were installed`)
})

test('the mirror comes first in a hosts.toml that has hosts, and what is for all of them stays before it', () => {
  const [file] = clientFiles('containerd', setup, () => false)
  const existing = `server = "https://r"\nclient = [\n  ["a", "b"],\n]\n\n[host."https://other"]\n  capabilities = ["pull"]\n`
  const lines = file?.content(Buffer.from(existing)).toString().split('\n') ?? []
  const at = (text: string) => lines.findIndex((line) => line.startsWith(text))
  assert.ok(at('client') < at('[host."http://127.0.0.1:5052"]'))
  assert.ok(at('[host."http://127.0.0.1:5052"]') < at('[host."https://other"]'))
})

test('without resolve only digests are asked of the mirror, and daemon.json is left alone', () => {
  const digestsOnly = mirrorClients.flatMap((client) =>
    clientFiles(client, { ...setup, resolve: false }, () => false),
  )
  assert.ok(!digestsOnly.some(({ path }) => path.endsWith('daemon.json')))
  const texts = digestsOnly.map((file) => file.content(undefined).toString())
  assert.ok(
    texts.every((text) => /capabilities = \["pull"\]$|pull-from-mirror = "digest-only"$/m.test(text)),
    texts.join('\n'),
  )
})

test('a directory with the other spelling of a port is the one that containerd looks at', () => {
  const other = '/etc/containerd/certs.d/127.0.0.1_6969_'
  const paths = clientFiles('containerd', setup, (path) => path === other).map(({ path }) => path)
  assert.deepEqual(
    paths.toSorted(),
    [`${other}/hosts.toml`, '/etc/containerd/certs.d/docker.io/hosts.toml', hosts].toSorted(),
  )
})

test('a file that somebody edited since is not touched without force, nor is anything else', async (t) => {
  const root = await temporaryDirectory(t)
  await put(root, hosts, 'server = "https://registry.example"\n')
  await (await openInstallation(root)).install(mirrorClients, allFiles, { force: false })
  await writeFile(join(root, hosts), 'mine\n')
  const edited = await snapshot(root)
  for (const act of [
    async () => (await openInstallation(root)).uninstall(mirrorClients, { force: false }),
    async () => (await openInstallation(root)).install(mirrorClients, allFiles, { force: false }),
  ]) {
    await assert.rejects(act, { code: 'EDITED', message: /hosts\.toml: it was edited since.*--force/ })
    assert.deepEqual(await snapshot(root), edited)
  }
  const states = await (await openInstallation(root)).status()
  assert.equal(states.find(({ path }) => path === hosts)?.state, 'edited')
  const changes = await (await openInstallation(root)).uninstall(mirrorClients, { force: true })
  assert.equal(await readFile(join(root, hosts), 'utf8'), 'server = "https://registry.example"\n')
  const kept = changes.find(({ path }) => path === hosts)?.kept ?? ''
  assert.equal(await readFile(join(root, kept), 'utf8'), 'mine\n')
})

test('other registries and one client of several: what is not wanted any more is restored, the rest stays', async (t) => {
  const root = await temporaryDirectory(t)
  await put(root, hosts, 'server = "https://registry.example"\n')
  await (await openInstallation(root)).install(mirrorClients, allFiles, { force: false })
  const one = { ...setup, registries: [{ host: 'new.example', plaintext: false }] }
  const changes = await (
    await openInstallation(root)
  ).install(
    ['containerd'],
    clientFiles('containerd', one, () => false),
    { force: false },
  )
  assert.deepEqual(changes.map(({ path, did }) => `${did} ${path}`).toSorted(), [
    'removed /etc/containerd/certs.d/127.0.0.1:6969/hosts.toml',
    'removed /etc/containerd/certs.d/docker.io/hosts.toml',
    `restored ${hosts}`,
    'written /etc/containerd/certs.d/new.example/hosts.toml',
  ])
  await (await openInstallation(root)).uninstall(['podman', 'docker'], { force: false })
  assert.deepEqual([...(await snapshot(root)).keys()].filter((path) => path.endsWith('.toml')).toSorted(), [
    '/etc/containerd/certs.d/new.example/hosts.toml',
    hosts,
  ])
  await (await openInstallation(root)).uninstall(mirrorClients, { force: false })
  assert.deepEqual(await readdir(join(root, 'etc')), ['containerd'])
  assert.deepEqual(await readdir(join(root, 'etc/containerd/certs.d')), ['registry.example'])
})

test('a crash between two steps is undone by uninstall', async (t) => {
  // A state that names a file which was not written yet, and one half way between two contents.
  const root = await temporaryDirectory(t)
  await put(root, hosts, 'before\n')
  await (await openInstallation(root)).install(mirrorClients, allFiles, { force: false })
  await writeFile(join(root, hosts), 'before\n')
  assert.equal(
    (await (await openInstallation(root)).status()).find(({ path }) => path === hosts)?.state,
    'restored',
  )
  await (await openInstallation(root)).uninstall(mirrorClients, { force: false })
  assert.equal(await readFile(join(root, hosts), 'utf8'), 'before\n')
})

test('a link, and a daemon.json that is no JSON, are left alone, with words', async (t) => {
  const root = await temporaryDirectory(t)
  await mkdir(dirname(join(root, hosts)), { recursive: true })
  await symlink('/nonexistent', join(root, hosts))
  await assert.rejects(
    async () => (await openInstallation(root)).install(mirrorClients, allFiles, { force: false }),
    { code: 'NOT_A_FILE' },
  )
  await rm(join(root, hosts))
  await put(root, '/etc/docker/daemon.json', '{ "debug": tru')
  const before = await snapshot(root)
  await assert.rejects(
    async () => (await openInstallation(root)).install(mirrorClients, allFiles, { force: false }),
    /daemon\.json: it is not JSON/,
  )
  assert.deepEqual(await snapshot(root), before)
})

test('rackswarm-agent mirror installs for the clients that are there, says what is missing, and takes it away', async (t) => {
  const root = await temporaryDirectory(t)
  const config = join(root, 'agent.yaml')
  await writeFile(config, 'server: https://registry.example\nmirror: { addr: "127.0.0.1:9" }\n')
  const mirror = (...args: string[]) => command(t, ['mirror', ...args, '--root', root, '--config', config])
  const none = await mirror('install')
  assert.equal(none.code, 1)
  assert.match(none.stderr, /There is no container client here/)
  await put(root, '/etc/containerd/config.toml', 'version = 2\n')
  const before = await snapshot(root)
  const installed = await mirror('install')
  assert.equal(installed.code, 0, installed.stderr)
  assert.equal(installed.stdout, `written\t${hosts}\n`)
  assert.match(installed.stderr, /Set mirror: \{ enabled: true \}/)
  assert.match(installed.stderr, /does not say config_path/)
  assert.match(await readFile(join(root, hosts), 'utf8'), /^server = "https:\/\/registry\.example"$/m)
  const status = await mirror('status', '--json')
  assert.equal(status.code, 1, 'nothing answers')
  assert.deepEqual(JSON.parse(status.stdout), {
    files: [{ client: 'containerd', path: hosts, state: 'installed' }],
    mirror: { url: 'http://127.0.0.1:9', enabled: false, answers: false },
  })
  const taken = await mirror('uninstall')
  assert.deepEqual([taken.code, taken.stdout], [0, `removed\t${hosts}\n`])
  assert.deepEqual(await snapshot(root), before)
  for (const [args, code, words] of [
    [['mirror'], 2, /need install, uninstall or status/],
    [['mirror', 'install', '--for', 'rkt'], 2, /--for "rkt": need containerd, podman, docker or all/],
    [['mirror', 'install', '--registry', '../etc'], 2, /need HOST or HOST:PORT/],
    [['mirror', 'install', '--config', join(root, 'no')], 78, /cannot be read/],
    [['mirror', '--help'], 0, /^$/],
  ] as const) {
    const answer = await command(t, args)
    assert.equal(answer.code, code, args.join(' '))
    assert.match(answer.stderr, words)
  }
})

async function command(t: TestContext, args: readonly string[]) {
  const child = spawn(process.execPath, [bin('rackswarm-agent'), ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  t.after(() => child.kill('SIGKILL'))
  const output = { stdout: '', stderr: '' }
  child.stdout.on('data', (data: Buffer) => (output.stdout += data.toString()))
  child.stderr.on('data', (data: Buffer) => (output.stderr += data.toString()))
  const [code] = (await once(child, 'close')) as [number | null]
  return { code, ...output }
}

async function put(root: string, path: string, content: string | Buffer, mode = 0o644): Promise<void> {
  await mkdir(dirname(join(root, path)), { recursive: true })
  await writeFile(join(root, path), content)
  await chmod(join(root, path), mode)
}

/** Every file, and every directory, but those of our own state. */
async function snapshot(root: string): Promise<Map<string, string>> {
  const found = new Map<string, string>()
  for (const name of await readdir(root, { recursive: true })) {
    if (name === 'var' || name.startsWith('var/')) continue
    const stats = await lstat(join(root, name))
    const content = stats.isFile() ? (await readFile(join(root, name))).toString('latin1') : ''
    found.set(`/${name}`, `${stats.mode.toString(8)} ${content}`)
  }
  return new Map([...found].sort(([a], [b]) => (a < b ? -1 : 1)))
}

// containerd of Debian, with everything of its own in one directory: it pulls, and runs nothing.
import { execFile, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { access, mkdir, open, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { until } from './until.ts'

const run = promisify(execFile)

export interface Containerd extends AsyncDisposable {
  /** Fetches all platforms of an image into the content store. @throws Error with what ctr wrote */
  fetch(
    reference: string,
    options: { hostsDirectory: string; user?: string; signal?: AbortSignal },
  ): Promise<void>
  /** The SHA-256 of what is in the content store under a SHA-256; undefined where there is nothing. */
  contentOf(sha256: string): Promise<string | undefined>
}

/** Needs root. Resolves once it answers. `namespace` is the network namespace that it pulls from. */
export async function startContainerd(
  directory: string,
  options: { namespace?: string } = {},
): Promise<Containerd> {
  await mkdir(directory, { recursive: true })
  const socket = join(directory, 'c.sock')
  const config = join(directory, 'config.toml')
  await writeFile(
    config,
    `version = 2
root = "${directory}/root"
state = "${directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart",
  ${['aufs', 'btrfs', 'devmapper', 'overlayfs', 'zfs'].map((name) => `"io.containerd.snapshotter.v1.${name}"`).join(', ')}]
[grpc]
  address = "${socket}"
[ttrpc]
  address = "${socket}.ttrpc"
`,
  )
  const log = await open(join(directory, 'containerd.log'), 'a')
  const { namespace } = options
  const within = namespace === undefined ? [] : ['ip', 'netns', 'exec', namespace]
  const all = [...within, 'containerd', '--config', config]
  const child = spawn(all[0] ?? 'containerd', all.slice(1), { stdio: ['ignore', log.fd, log.fd] })
  await log.close()
  const ended = new Promise((settle) => child.once('exit', settle))
  const end = async () => {
    child.kill('SIGKILL')
    await ended
  }
  const ctr = (args: readonly string[], signal?: AbortSignal) => {
    const all = [...within, 'ctr', '--address', socket, ...args]
    return run(all[0] ?? 'ctr', all.slice(1), { signal, maxBuffer: 64 * 1024 * 1024 })
  }
  try {
    await until('containerd answers', async () => {
      if (child.exitCode !== null) throw new Error(`containerd has ended with ${child.exitCode}`)
      return ctr(['version']).then(
        () => true,
        () => false,
      )
    })
  } catch (cause) {
    await end()
    throw new Error(`containerd is not up; its log is ${directory}/containerd.log`, { cause })
  }
  return {
    fetch: async (reference, { hostsDirectory, user, signal }) => {
      const login = user === undefined ? [] : ['--user', user]
      await ctr(
        ['content', 'fetch', '--all-platforms', '--hosts-dir', hostsDirectory, ...login, reference],
        signal,
      )
    },
    contentOf: async (sha256) => {
      const file = join(directory, 'root', 'io.containerd.content.v1.content', 'blobs', 'sha256', sha256)
      const isThere = await access(file).then(
        () => true,
        () => false,
      )
      if (!isThere) return undefined
      const hash = createHash('sha256')
      for await (const chunk of createReadStream(file, { highWaterMark: 1024 * 1024 }))
        hash.update(chunk as Buffer)
      return hash.digest('hex')
    },
    [Symbol.asyncDispose]: end,
  }
}

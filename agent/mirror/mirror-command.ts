import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { UnreachableError, createHttpClient } from '../../lib/client/http.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import { ConfigError, loadConfig } from '../../lib/runtime/config.ts'
import { errorCode, ignoreMissing } from '../../lib/runtime/files.ts'
import { defaultPaths } from '../../lib/runtime/paths.ts'
import { AgentConfig, isRegistryHost, mirroredRegistries } from '../config.ts'
import type { MirrorClient, MirrorSetup } from './client-files.ts'
import { clientDirectories, clientFiles, mirrorClients } from './client-files.ts'
import type { Change, FileState } from './installation.ts'
import { openInstallation } from './installation.ts'

const usage = `Usage: rackswarm-agent mirror install [--for CLIENT]... [--registry HOST]... [--resolve] [OPTIONS]
       rackswarm-agent mirror uninstall [--for CLIENT]... [OPTIONS]
       rackswarm-agent mirror status [--json] [OPTIONS]
Has the container clients of this host pull through the agent, undoes that, or says how it stands.

  --for CLIENT     containerd, podman (skopeo and CRI-O too), docker or all (default: those that are on this host)
  --registry HOST  a registry, as it stands in image references (default: mirror.registries of the configuration)
  --resolve        the mirror also says what a tag means; without it only what has a digest is asked of it
  --force          goes on where somebody has edited a file since, and keeps a copy of it
  --config FILE    the configuration of the agent (default: ${defaultPaths('agent').config})
  --root DIR       stands before every path, for an image of a host
  --json           status for programs

Exit codes: 0 done, or all is as it was installed; 1 failed, or it is not; 2 wrong arguments; 78 unusable configuration.
`

interface Options {
  readonly action: 'install' | 'uninstall' | 'status'
  readonly clients: readonly MirrorClient[] | undefined
  readonly registries: readonly string[] | undefined
  readonly resolve: boolean
  readonly force: boolean
  readonly config: string
  readonly root: string
  readonly json: boolean
}

/** `rackswarm-agent mirror`. @returns the exit code */
export async function mirrorCommand(argv: readonly string[]): Promise<number> {
  let options: Options | 'help'
  try {
    options = readOptions(argv)
  } catch (error) {
    process.stderr.write(`rackswarm-agent mirror: ${(error as Error).message}\n${usage}`)
    return 2
  }
  if (options === 'help') {
    process.stdout.write(usage)
    return 0
  }
  try {
    switch (options.action) {
      case 'install':
        return await install(options)
      case 'uninstall':
        return await uninstall(options)
      case 'status':
        return await status(options)
    }
  } catch (error) {
    const hint = ['EACCES', 'EPERM'].includes(errorCode(error) ?? '') ? '\nRun it as root.' : ''
    process.stderr.write(`rackswarm-agent mirror: ${(error as Error).message}${hint}\n`)
    return error instanceof ConfigError ? 78 : 1
  }
}

async function install(options: Options): Promise<number> {
  const config = await loadConfig(AgentConfig, options.config)
  const clients = options.clients ?? clientsOn(options.root)
  if (clients.length === 0)
    throw new ClientError(
      'NO_CLIENT',
      `There is no container client here: none of ${Object.values(clientDirectories).join(', ')}; --for names one that will come`,
    )
  const setup = setupOf(config, options)
  const isThere = (path: string) => existsSync(join(options.root, path))
  const files = clients.flatMap((client) => clientFiles(client, setup, isThere))
  const installation = await openInstallation(options.root)
  report(await installation.install(clients, files, options))
  const notes = await notesOn(clients, setup, config, options)
  for (const note of notes) process.stderr.write(`${note}\n`)
  return 0
}

async function uninstall(options: Options): Promise<number> {
  const installation = await openInstallation(options.root)
  const changes = await installation.uninstall(options.clients ?? mirrorClients, options)
  report(changes)
  if (changes.length === 0) process.stderr.write('Nothing was installed.\n')
  if (changes.some(({ path }) => path.endsWith('daemon.json')))
    process.stderr.write('docker: systemctl reload docker puts it in force.\n')
  return 0
}

async function status(options: Options): Promise<number> {
  const files = await (await openInstallation(options.root)).status()
  const wanted = files.filter(({ client }) => options.clients?.includes(client) ?? true)
  const config = await loadConfig(AgentConfig, options.config).catch((error: unknown) => {
    if (error instanceof ConfigError && !existsSync(options.config)) return undefined
    throw error
  })
  const url = config && mirrorUrlOf(config)
  const answers = url !== undefined && (await isAnswering(url))
  if (options.json) {
    process.stdout.write(
      `${JSON.stringify({ files: wanted, mirror: { url, enabled: config?.mirror.enabled ?? false, answers } })}\n`,
    )
  } else {
    for (const { client, path, state } of wanted)
      process.stdout.write(`${client}\t${path}\t${stateWords[state]}\n`)
    if (wanted.length === 0) process.stderr.write('Nothing is installed: rackswarm-agent mirror install\n')
    process.stderr.write(
      url === undefined
        ? `There is no ${options.config}, which says where the mirror is.\n`
        : answers
          ? `The mirror answers at ${url}.\n`
          : `Nothing answers at ${url}: clients pull from the registry. ${whyNot(config, options.config)}\n`,
    )
  }
  return answers && wanted.length > 0 && wanted.every(({ state }) => state === 'installed') ? 0 : 1
}

const stateWords: Readonly<Record<FileState, string>> = {
  installed: 'as installed',
  edited: 'edited since',
  gone: 'removed since',
  restored: 'as it was before the installation',
}

function whyNot(config: AgentConfig | undefined, file: string): string {
  return config?.mirror.enabled === false
    ? `Set mirror: { enabled: true } in ${file}, and restart the agent.`
    : 'Does the agent run?'
}

function report(changes: readonly Change[]): void {
  for (const { path, did, kept } of changes)
    process.stdout.write(`${did}\t${path}${kept === undefined ? '' : `\tthe edited file is now ${kept}`}\n`)
}

/** What a person has to do besides. */
async function notesOn(
  clients: readonly MirrorClient[],
  setup: MirrorSetup,
  config: AgentConfig,
  options: Options,
): Promise<string[]> {
  const notes: string[] = []
  if (!config.mirror.enabled)
    notes.push(`The agent does not serve pulls yet. ${whyNot(config, options.config)}`)
  const served = mirroredRegistries(config)
  const others = setup.registries.filter(({ host }) => !served.includes(host)).map(({ host }) => host)
  if (others.length > 0)
    notes.push(
      `The agent will not answer for ${others.join(', ')}: add that to mirror.registries in ${options.config}.`,
    )
  if (clients.includes('containerd')) {
    const file = '/etc/containerd/config.toml'
    const text = (await readFile(join(options.root, file), 'utf8').catch(ignoreMissing)) ?? ''
    if (!/^\s*config_path\s*=\s*["'][^"']*\/etc\/containerd\/certs\.d/m.test(text))
      notes.push(
        `containerd: ${file} does not say config_path = "/etc/containerd/certs.d" under [plugins."io.containerd.grpc.v1.cri".registry] (version 3: [plugins.'io.containerd.cri.v1.images'.registry]); set it, and restart containerd.`,
      )
  }
  if (clients.includes('podman'))
    notes.push('podman and skopeo need no restart; CRI-O does: systemctl reload crio.')
  if (clients.includes('docker')) {
    notes.push('docker: hosts.toml counts with the containerd image store; it needs no restart.')
    if (setup.registries.some(({ host }) => host === 'docker.io'))
      notes.push(
        setup.resolve
          ? 'docker: systemctl reload docker puts the registry-mirrors of daemon.json in force.'
          : 'docker: without its containerd image store docker.io goes through the mirror only with --resolve.',
      )
  }
  return notes
}

function setupOf(config: AgentConfig, { registries, resolve }: Options): MirrorSetup {
  const server = new URL(config.server)
  return {
    mirrorUrl: mirrorUrlOf(config),
    registries: (registries ?? mirroredRegistries(config)).map((host) => ({
      host,
      plaintext: host === server.host && server.protocol === 'http:',
    })),
    resolve,
  }
}

function mirrorUrlOf({ mirror: { addr } }: AgentConfig): string {
  return `http://${addr.host.includes(':') ? `[${addr.host}]` : addr.host}:${addr.port}`
}

function clientsOn(root: string): MirrorClient[] {
  return mirrorClients.filter((client) => existsSync(join(root, clientDirectories[client])))
}

async function isAnswering(url: string): Promise<boolean> {
  await using http = createHttpClient({ baseUrl: url, connectTimeoutMs: 1000, idleTimeoutMs: 2000 })
  try {
    const answer = await http.send({ path: '/v2/' })
    await answer.discard()
    return answer.status === 200
  } catch (error) {
    if (error instanceof UnreachableError) return false
    throw error
  }
}

/** @throws Error naming what is wrong */
function readOptions(argv: readonly string[]): Options | 'help' {
  const { values, positionals } = parseArgs({
    args: [...argv],
    options: {
      for: { type: 'string', multiple: true },
      registry: { type: 'string', multiple: true },
      resolve: { type: 'boolean', default: false },
      force: { type: 'boolean', default: false },
      config: { type: 'string' },
      root: { type: 'string', default: '/' },
      json: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
    allowPositionals: true,
  })
  if (values.help) return 'help'
  const [action, ...rest] = positionals
  if ((action !== 'install' && action !== 'uninstall' && action !== 'status') || rest.length > 0)
    throw new Error('need install, uninstall or status')
  const registries = values.registry?.map((host) => {
    if (isRegistryHost(host)) return host
    throw new Error(`--registry ${JSON.stringify(host)}: need HOST or HOST:PORT`)
  })
  return {
    action,
    clients: values.for && clientsNamed(values.for),
    registries: registries && [...new Set(registries)],
    resolve: values.resolve,
    force: values.force,
    config: values.config ?? defaultPaths('agent').config,
    root: values.root,
    json: values.json,
  }
}

function clientsNamed(names: readonly string[]): readonly MirrorClient[] {
  if (names.includes('all')) return mirrorClients
  const unknown = names.find((name) => !mirrorClients.some((client) => client === name))
  if (unknown !== undefined)
    throw new Error(`--for ${JSON.stringify(unknown)}: need ${mirrorClients.join(', ')} or all`)
  return mirrorClients.filter((client) => names.includes(client))
}

import { join } from 'node:path'
import { createAgentClient } from '../../lib/client/agent-client.ts'
import type { SwarmServer } from './fleet.ts'
import { socketOf, startSwarmAgent } from './fleet.ts'
import type { ForeignClient } from './foreign.ts'
import { createAria2Client, startLibtorrentClient } from './foreign.ts'
import type { HostStation } from './network.ts'
import type { LogEntry, Program } from './programs.ts'
import type { ClientKind } from './sides.ts'

export interface Build {
  readonly repository: string
  readonly file: string
  /** Hex. */
  readonly sha256: string
}

/** A host of the swarm and what it runs. */
export interface Host extends AsyncDisposable {
  readonly station: HostStation
  readonly client: ClientKind
  /** Starts its program; what it had before counts. */
  start(): Promise<void>
  kill(): Promise<void>
  /** Has another client than an agent fetch; agents hear of tags themselves. */
  fetch(torrent: string): void
  /** When it knew of a release, and when it had all of it, verified and exposed. Releases by the digest of the manifest. */
  heardAtMs(digest: string): number | undefined
  doneAtMs(digest: string): number | undefined
  /** Bytes that came into the rack for it, of all releases. */
  bytesFromOutside(): Promise<number>
  copyOf(build: Build): string
}

export interface HostOptions {
  readonly directory: string
  readonly client: ClientKind
  readonly server: SwarmServer
  readonly builds: readonly Build[]
  /** YAML for agent.yaml. */
  readonly settings: string
  /** Something has changed. */
  readonly changed: () => void
}

export function createHost(station: HostStation, options: HostOptions): Host {
  return options.client === 'agent'
    ? createAgentHost(station, options)
    : createForeignHost(station, options, options.client)
}

function createAgentHost(
  station: HostStation,
  { directory, server, builds, settings, changed }: HostOptions,
): Host {
  const heard = new Map<string, number>()
  const done = new Map<string, number>()
  const logged = ({ msg, atMs, fields }: LogEntry) => {
    const times = { 'followed reference has changed: fetching it': heard, 'release ready': done }[msg]
    const digest = String(fields['digest'])
    if (times === undefined || times.has(digest)) return
    times.set(digest, atMs)
    changed()
  }
  let program: Program | undefined
  const kill = async () => program?.kill()
  return {
    station,
    client: 'agent',
    start: async () => {
      const follow = builds.map(({ repository }) => `${repository}:latest`)
      program = await startSwarmAgent(station, directory, server, { follow, settings, logged })
    },
    kill,
    fetch: () => undefined,
    heardAtMs: (digest) => heard.get(digest),
    doneAtMs: (digest) => done.get(digest),
    bytesFromOutside: async () => {
      await using client = createAgentClient({ socketPath: socketOf(directory) })
      const { references } = await client.status()
      return references.reduce((sum, { bytes }) => sum + bytes.otherRacks + bytes.webseed, 0)
    },
    copyOf: ({ repository, file }) =>
      join(directory, 'data', 'releases', repository, 'latest', 'current', file.split('/').at(-1) ?? ''),
    [Symbol.asyncDispose]: kill,
  }
}

/** Fetches one build. */
function createForeignHost(
  station: HostStation,
  { directory, changed }: HostOptions,
  kind: Exclude<ClientKind, 'agent'>,
): Host {
  let client: ForeignClient | undefined
  let heardAt: number | undefined
  let doneAt: number | undefined
  const done = (atMs: number) => {
    doneAt = atMs
    changed()
  }
  const kill = async () => client?.[Symbol.asyncDispose]()
  return {
    station,
    client: kind,
    start: async () => {
      const create = kind === 'aria2' ? createAria2Client : startLibtorrentClient
      client = await create(station, { directory, done })
    },
    kill,
    fetch: (torrent) => {
      heardAt = Date.now()
      client?.fetch(torrent)
    },
    heardAtMs: () => heardAt,
    doneAtMs: () => doneAt,
    bytesFromOutside: async () => 0,
    copyOf: ({ sha256 }) => join(directory, sha256),
    [Symbol.asyncDispose]: kill,
  }
}

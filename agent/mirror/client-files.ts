import { ClientError } from '../../lib/protocol/errors.ts'

export const mirrorClients = ['containerd', 'podman', 'docker'] as const
export type MirrorClient = (typeof mirrorClients)[number]

/** What clients are told. */
export interface MirrorSetup {
  /** `http://127.0.0.1:5052`. */
  readonly mirrorUrl: string
  readonly registries: readonly { readonly host: string; readonly plaintext: boolean }[]
  /** The mirror also says what a tag means; else only what has a digest is asked of it. */
  readonly resolve: boolean
}

/** A file of a client's configuration. */
export interface ClientFile {
  readonly client: MirrorClient
  /** Absolute. */
  readonly path: string
  /** What it should be, by what it is without us. @throws ClientError where that cannot be built upon */
  content(existing: Buffer | undefined): Buffer
}

const heading =
  '# Written by `rackswarm-agent mirror install`; `rackswarm-agent mirror uninstall` takes it away.\n'
/** Where each client has its configuration; without it the client is not there. */
export const clientDirectories: Readonly<Record<MirrorClient, string>> = {
  containerd: '/etc/containerd',
  podman: '/etc/containers',
  docker: '/etc/docker',
}

/**
 * The files by which a client pulls through the mirror.
 *
 * @param isThere whether a path exists: containerd has two ways to name a directory for a host with a port, and looks at the first that is there
 */
export function clientFiles(
  client: MirrorClient,
  setup: MirrorSetup,
  isThere: (path: string) => boolean,
): readonly ClientFile[] {
  switch (client) {
    case 'containerd':
      return setup.registries.map((registry) => {
        const escaped = `/etc/containerd/certs.d/${registry.host.replace(/:(\d+)$/, '_$1_')}`
        const plain = `/etc/containerd/certs.d/${registry.host}`
        return hostsFile(client, isThere(escaped) ? escaped : plain, registry, setup)
      })
    case 'podman':
      return [
        {
          client,
          path: '/etc/containers/registries.conf.d/50-rackswarm.conf',
          content: () => Buffer.from(registriesConf(setup)),
        },
      ]
    case 'docker':
      return [
        ...setup.registries.map((registry) =>
          hostsFile(client, `/etc/docker/certs.d/${registry.host}`, registry, setup),
        ),
        // Docker asks these mirrors for tags, whatever they are to be trusted with.
        ...(setup.resolve && setup.registries.some(({ host }) => host === 'docker.io')
          ? [
              {
                client,
                path: '/etc/docker/daemon.json',
                content: (existing: Buffer | undefined) => withRegistryMirror(existing, setup.mirrorUrl),
              },
            ]
          : []),
      ]
  }
}

function hostsFile(
  client: MirrorClient,
  directory: string,
  registry: MirrorSetup['registries'][number],
  setup: MirrorSetup,
): ClientFile {
  const path = `${directory}/hosts.toml`
  return { client, path, content: (existing) => withMirrorHost(existing, path, registry, setup) }
}

/** hosts.toml (containerd docs/hosts.md): what is there stays in force, and the mirror is asked first. */
function withMirrorHost(
  existing: Buffer | undefined,
  path: string,
  { host, plaintext }: MirrorSetup['registries'][number],
  { mirrorUrl, resolve }: MirrorSetup,
): Buffer {
  const table = `[host."${mirrorUrl}"]
  capabilities = [${resolve ? '"pull", "resolve"' : '"pull"'}]
  dial_timeout = "1s"
`
  if (existing === undefined) {
    const server = host === 'docker.io' ? 'registry-1.docker.io' : host
    return Buffer.from(`${heading}server = "${plaintext ? 'http' : 'https'}://${server}"\n\n${table}`)
  }
  // Bytes as characters: whatever they are, they stay as they are.
  const text = existing.toString('latin1')
  if (text.includes(mirrorUrl))
    throw new ClientError(
      'ALREADY_THERE',
      `Cannot add the mirror to ${path}: it names ${mirrorUrl} already; take that out, or leave the file as it is`,
    )
  // Hosts are asked in the order of the file. Before the first table of one stands what is for all of them.
  const first = /^[ \t]*\[[ \t]*["']?host["']?[ \t]*[.\]]/m.exec(text)?.index ?? text.length
  const before = text.slice(0, first)
  const gap = before === '' || before.endsWith('\n') ? '' : '\n'
  return Buffer.from(`${before}${gap}${heading}${table}\n${text.slice(first)}`, 'latin1')
}

/** registries.conf.d (containers-registries.conf(5)). */
function registriesConf({ mirrorUrl, registries, resolve }: MirrorSetup): string {
  const tables = registries.map(
    ({ host, plaintext }) => `[[registry]]
location = "${host}"
${plaintext ? 'insecure = true\n' : ''}
[[registry.mirror]]
location = "${new URL(mirrorUrl).host}"
insecure = true
pull-from-mirror = "${resolve ? 'all' : 'digest-only'}"
`,
  )
  return [heading, ...tables].join('\n')
}

/** daemon.json: its `registry-mirrors` are those of docker.io alone. */
function withRegistryMirror(existing: Buffer | undefined, mirrorUrl: string): Buffer {
  const settings = existing === undefined ? {} : readJson(existing)
  const mirrors: unknown = settings['registry-mirrors'] ?? []
  if (!Array.isArray(mirrors))
    throw new ClientError(
      'BAD_FILE',
      'Cannot add the mirror to /etc/docker/daemon.json: its registry-mirrors is no list; mend it first',
    )
  const others = (mirrors as unknown[]).filter((url) => url !== mirrorUrl)
  return Buffer.from(
    `${JSON.stringify({ ...settings, 'registry-mirrors': [mirrorUrl, ...others] }, undefined, 2)}\n`,
  )
}

function readJson(bytes: Buffer): Record<string, unknown> {
  let value: unknown
  try {
    value = JSON.parse(bytes.toString())
  } catch (cause) {
    throw new ClientError(
      'BAD_FILE',
      `Cannot add the mirror to /etc/docker/daemon.json: it is not JSON (${(cause as Error).message}); mend it first`,
      { cause },
    )
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value))
    return value as Record<string, unknown>
  throw new ClientError(
    'BAD_FILE',
    'Cannot add the mirror to /etc/docker/daemon.json: it is no object; mend it first',
  )
}

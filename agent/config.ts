import { z } from 'zod'
import { repositoryPattern } from '../lib/client/api.ts'
import { formatReference, parseReference } from '../lib/protocol/reference.ts'
import { formatIp, isLoopback, parseIp } from '../lib/protocol/address.ts'
import { duration, parsed, size } from '../lib/runtime/config.ts'

const reference = z.string().transform((text, context) => {
  try {
    return formatReference(parseReference(text))
  } catch (error) {
    context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) })
    return z.NEVER
  }
})

const signaturePolicy = z.enum(['require', 'warn', 'accept_unsigned'])
const keyFiles = z.array(z.string().min(1)).max(32)

function readIp(text: string): string {
  const ip = parseIp(text)
  if (ip === undefined) throw new Error('need an IP address')
  return formatIp(ip)
}

/** `HOST:PORT` of loopback: who can connect to the mirror may pull what the host may. */
function loopbackAddress(text: string): { host: string; port: number } {
  const match = /^(?:\[([0-9a-fA-F:]+)\]|([0-9.]+)):(\d{1,5})$/.exec(text)
  const ip = parseIp(match?.[1] ?? match?.[2] ?? '')
  const port = Number(match?.[3])
  if (!ip || port > 65535 || !isLoopback(ip))
    throw new Error('need ADDRESS:PORT with an address of loopback, such as 127.0.0.1:5052 or [::1]:5052')
  return { host: formatIp(ip), port }
}

/** agent.yaml. */
export const AgentConfig = z.strictObject({
  server: z
    .url({ protocol: /^https?$/ })
    .transform((url) => url.replace(/\/+$/, ''))
    .describe('The `public_url` of the server.'),
  ca: z
    .string()
    .optional()
    .describe(
      'PEM file of the authority that signed the certificate of the server, where the system does not know it.',
    ),
  insecure_plaintext: z
    .boolean()
    .default(false)
    .describe('Says that an `http:` URL to another machine is meant: credentials then travel in the clear.'),
  host: z
    .string()
    .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/, 'need up to 128 of A-Z a-z 0-9 . _ -')
    .optional()
    .describe('The name of this host. Default: the host name of the system.'),
  place: z
    .string()
    .optional()
    .describe('The rack this host says it is in; counts only where the bootstrap token allows it.'),
  bootstrap_token_file: z
    .string()
    .optional()
    .describe(
      'File with the bootstrap token; needed once, to enrol. RACKSWARM_BOOTSTRAP_TOKEN does the same.',
    ),
  data_dir: z
    .string()
    .optional()
    .describe(
      'Blobs, releases and the credential. Default: /var/lib/rackswarm/agent, or below XDG_STATE_HOME without root.',
    ),
  control_socket: z
    .string()
    .optional()
    .describe(
      'The unix socket for deployctl. Default: /run/rackswarm/agent.sock, or below XDG_RUNTIME_DIR without root.',
    ),
  control_group: z
    .string()
    .default('rackswarm')
    .describe('Group that may use the control socket, where there is such a group.'),
  metrics_addr: z
    .string()
    .regex(/^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):\d{1,5}$/, 'need HOST:PORT')
    .default('127.0.0.1:6882')
    .describe('/metrics, /livez and /readyz.'),
  log_level: z
    .enum(['trace', 'debug', 'info', 'warn', 'error'])
    .default('info')
    .describe('Least severe log line that is written.'),
  follow: z
    .array(reference)
    .max(1000)
    .default([])
    .describe('References that this host always has: fetched as soon as the tag moves.'),
  signatures: z
    .strictObject({
      policy: signaturePolicy
        .default('require')
        .describe(
          'What is taken: with `require` releases that one of `keys` has signed; with `warn` all, those without a good signature with a warning; with `accept_unsigned` all, and no signature is looked at.',
        ),
      keys: keyFiles
        .default([])
        .describe(
          'Files with the public keys of who may publish, as PEM or JWK: `deployctl keys generate-signing` writes one.',
        ),
      accept_other_tags: z
        .boolean()
        .default(false)
        .describe(
          'Takes a release for every tag of its repository, whichever tag it was signed for; for builds that are promoted by moving a tag.',
        ),
      repositories: z
        .array(
          z.strictObject({
            match: z.array(repositoryPattern).min(1).max(100),
            policy: signaturePolicy.optional(),
            keys: keyFiles.optional(),
            accept_other_tags: z.boolean().optional(),
          }),
        )
        .max(100)
        .default([])
        .describe(
          'Other rules for some repositories: the first that matches counts, and what it leaves out is as above.',
        ),
    })
    .prefault({})
    .describe(
      'Who must have signed what this host takes; a release that is refused leaves the one before it current. The rules and the files are read again on SIGHUP.',
    ),
  engine: z
    .enum(['webtorrent', 'rackswarm'])
    .default('rackswarm')
    .describe(
      'What moves the pieces: `rackswarm`, our own, or `webtorrent`, a fourth as fast. Hosts with either serve each other.',
    ),
  peers: z
    .enum(['approved', 'any'])
    .default('approved')
    .describe(
      'Who is served, and asked: `approved` agents show each other tokens of the server, and whoever only knows an address gets nothing; `any` admits other BitTorrent clients too.',
    ),
  peer_port: z
    .int()
    .min(0)
    .max(65535)
    .default(6881)
    .describe('TCP port for other peers; 0 lets the system choose.'),
  peer_addr: parsed(readIp)
    .optional()
    .describe(
      'The IP address to listen on for other peers, and to dial them and to announce from. Default: every address, and what the system chooses.',
    ),
  peer_tls: z
    .enum(['off', 'accept', 'require'])
    .default('off')
    .describe(
      'TLS 1.3 between agents, each with a certificate of its own that its token names: `accept` takes connections with and without it, `require` only such as have it, and dials with it. For a fleet: first `accept` everywhere, then `require`. It costs a third of the rate.',
    ),
  limits: z
    .strictObject({
      download: size().prefault('512MiB').describe('Bytes a second from all sources.'),
      upload: size().prefault('512MiB').describe('Bytes a second to all peers.'),
      from_distance: z
        .array(
          z.strictObject({
            distance: z
              .int()
              .min(1)
              .max(255)
              .describe('1 is whatever leaves the rack, 2 what leaves the level above it, and so on.'),
            download: size().optional().describe('Bytes a second from there.'),
            upload: size().optional().describe('Bytes a second to there.'),
          }),
        )
        .max(16)
        .default([])
        .describe('Within these, for all peers of a distance or more together.'),
      connections_max: z.int().positive().default(60).describe('Connections per torrent.'),
      fetches_max: z.int().positive().default(4).describe('Blobs fetched at once.'),
    })
    .prefault({})
    .describe(
      'What the host gives to the swarm; what you trade is the speed of a deploy against what runs on the host. Rates are read again on SIGHUP.',
    ),
  disk: z
    .strictObject({
      quota: size()
        .prefault('20GiB')
        .describe(
          'Bytes of blobs kept. Least recently used ones go first, what only an earlier release needs after all others; the current release of what is followed or pinned, and what is in use, never goes.',
        ),
      reserve: size().prefault('1GiB').describe('Fetches wait while less than this is free on the disk.'),
      releases_kept: z
        .int()
        .min(1)
        .default(2)
        .describe(
          'Releases of a followed tag that stay exposed, the current one included, while the quota has room for them.',
        ),
    })
    .prefault({})
    .describe('What the host keeps.'),
  mirror: z
    .strictObject({
      enabled: z
        .boolean()
        .default(false)
        .describe(
          'Serves pulls. Every user and container of this host that can connect may then pull what the host may.',
        ),
      addr: parsed(loopbackAddress)
        .prefault('127.0.0.1:5052')
        .describe('Where it listens; loopback alone, since it asks nobody for a credential.'),
      registries: z
        .array(z.string().refine(isRegistryHost, 'need HOST or HOST:PORT'))
        .min(1)
        .max(100)
        .optional()
        .describe(
          'Registries, by the names in image references, whose images the server has under the same names. Default: the host and port of `server`.',
        ),
      signatures: z
        .enum(['require', 'ignore'])
        .default('ignore')
        .describe(
          'With `require` manifests are served only where the rules of `signatures` take them, as releases; what they refuse clients ask the registry for. With `ignore` signatures are up to the clients.',
        ),
    })
    .prefault({})
    .describe(
      'A registry on loopback from which containerd, podman and docker pull through the swarm: docs/mirror.md.',
    ),
  follow_jitter: duration()
    .prefault('1s')
    .describe(
      'A changed tag is fetched after a random wait of up to this long, so that hosts do not all start at once.',
    ),
  stall_timeout: duration()
    .prefault('10s')
    .describe(
      'A fetch without a byte for this long asks for the webseed; after twice as long its connections are made anew.',
    ),
})
export type AgentConfig = z.output<typeof AgentConfig>

/** Whether a text is the host part of an image reference: `registry.example`, `10.0.0.1:5000`, `[::1]:5000`. */
export function isRegistryHost(text: string): boolean {
  return /^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(:\d{1,5})?$/.test(text)
}

/** The registries that the mirror answers for, by the names in image references. */
export function mirroredRegistries({ server, mirror }: AgentConfig): readonly string[] {
  return mirror.registries ?? [new URL(server).host]
}

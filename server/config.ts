import { z } from 'zod'
import { parseCidr } from '../lib/protocol/cidr.ts'
import { parsePlace } from '../lib/protocol/place.ts'
import { duration, size } from '../lib/runtime/config.ts'

/** A text that `parse` accepts; its message becomes the fault. */
function parsed<Value>(parse: (text: string) => Value) {
  return z.string().transform((text, context) => {
    try {
      return parse(text)
    } catch (error) {
      context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) })
      return z.NEVER
    }
  })
}

/** `HOST:PORT`, `[IPV6]:PORT`; port 0 lets the system choose. */
export function listenAddress() {
  return parsed((text) => {
    const match = /^(?:\[([0-9a-fA-F:]+)\]|([A-Za-z0-9.-]+)):(\d{1,5})$/.exec(text)
    const port = Number(match?.[3])
    if (!match || port > 65535) throw new Error('need HOST:PORT or [IPV6]:PORT')
    return { host: match[1] ?? match[2] ?? '', port }
  })
}

const http = z
  .strictObject({
    addr: listenAddress()
      .prefault('127.0.0.1:6969')
      .describe(
        'Where the tracker, the registry and the APIs listen. A non-loopback address needs `tls` or `insecure_plaintext`.',
      ),
    tls: z
      .strictObject({
        cert: z.string().describe('PEM file with the certificate and its chain.'),
        key: z.string().describe('PEM file with the private key.'),
      })
      .optional()
      .describe('Serves the main port over TLS 1.2 or newer.'),
    insecure_plaintext: z
      .boolean()
      .default(false)
      .describe(
        'Says that plaintext on a non-loopback address is meant, because something in front of the server speaks TLS.',
      ),
    trusted_proxies: z
      .array(parsed(parseCidr))
      .default([])
      .describe(
        'Networks whose X-Forwarded-For is believed: the right-most hop outside them is the client. Empty: the header is ignored.',
      ),
    request_timeout: duration()
      .prefault('30s')
      .describe(
        'How long the head of a request may take; what you trade is slow clients against held sockets.',
      ),
    idle_timeout: duration()
      .prefault('60s')
      .describe('How long a kept-alive connection, or a body that stands still, may be silent.'),
    connections_max: z
      .int()
      .positive()
      .default(20_000)
      .describe('Open connections beyond which new ones are refused.'),
  })
  .prefault({})
  .describe('The main port.')

const topology = z
  .strictObject({
    levels: z
      .array(z.string())
      .default(['rack'])
      .describe(
        'Names of the levels, nearest first, such as [rack, row, datacentre]. Every place of `places` has a parent for each level above its own.',
      ),
    places: z
      .record(
        z.string(),
        z.strictObject({
          parents: z.array(z.string()).describe('The parents, nearest first: [row, datacentre].'),
        }),
      )
      .default({})
      .describe(
        'Leaf places and their parents. A leaf that is not listed is its own rack directly under the root.',
      ),
    prefixes: z
      .array(z.strictObject({ cidr: parsed(parseCidr), place: parsed(parsePlace) }))
      .max(2000)
      .default([])
      .describe('Which network is which place; the longest prefix wins.'),
    ipv4_prefix_length: z
      .int()
      .min(0)
      .max(32)
      .default(24)
      .describe('An IPv4 address that no prefix covers has the network of this length as its place.'),
    ipv6_prefix_length: z.int().min(0).max(128).default(64).describe('The same for IPv6.'),
  })
  .prefault({})
  .describe('Where hosts are. A place is a leaf name; a host is placed by its token, else by this table.')

const tracker = z
  .strictObject({
    approval: z
      .enum(['token', 'none'])
      .default('token')
      .describe(
        '`token`: only announces and scrapes with a token for that infohash. `none`: anyone may announce anything.',
      ),
    numwant_default: z
      .int()
      .min(0)
      .default(50)
      .describe('Peers in a reply to a client that does not say how many it wants.'),
    numwant_max: z.int().min(1).max(1000).default(100).describe('Peers in a reply at most.'),
    scrape_max: z.int().min(1).default(50).describe('Infohashes in one scrape at most; more are refused.'),
    gateways_per_rack: z
      .int()
      .min(1)
      .default(3)
      .describe(
        'Leechers of each rack that are sent to far peers at once, at most (one for every eight); the others hold far peers in reserve. More means more cross-rack bytes, fewer a slower first wave.',
      ),
    reserve_peers: z
      .int()
      .min(1)
      .default(4)
      .describe('Far peers that everyone gets besides its rack, so that no rack is an island.'),
  })
  .prefault({})
  .describe('What the tracker answers.')

const storage = z
  .strictObject({
    name: z.literal('memory').default('memory').describe('Where swarms are kept.'),
    config: z
      .strictObject({
        peers_max: z
          .int()
          .positive()
          .default(5_000_000)
          .describe('Peers kept; announces beyond it are answered but not stored.'),
        swarms_max: z
          .int()
          .positive()
          .default(1_000_000)
          .describe('Swarms kept, those remembered for their `downloaded` count included.'),
      })
      .prefault({}),
  })
  .prefault({})

const tokens = z
  .strictObject({
    issuer: z.string().optional().describe('The `iss` of tokens. Default: `public_url`.'),
    audience: z.string().optional().describe('The `aud` of tokens. Default: `public_url`.'),
    algorithm: z
      .enum(['ES256', 'Ed25519', 'RS256'])
      .default('ES256')
      .describe('What new signing keys are for; the key in use keeps its own.'),
    agent_ttl: duration()
      .prefault('15m')
      .describe('Life of the announce tokens of agents; they renew at a third of it left.'),
    torrent_ttl: duration()
      .prefault('24h')
      .describe('Life of the announce token inside a .torrent, unless asked otherwise.'),
    host_ttl: duration().prefault('30d').describe('Life of a host credential; hosts renew at two thirds.'),
    api_ttl: duration()
      .prefault('90d')
      .describe('Life of a token of `deployctl token create`, unless asked otherwise.'),
    clock_tolerance: duration().prefault('120s').describe('How far clocks may differ.'),
    bind_address: z
      .boolean()
      .default(true)
      .describe(
        'Announce tokens of agents count only from the address that asked for them. Turn it off where hosts reach the server through changing addresses.',
      ),
    keys_file: z
      .string()
      .optional()
      .describe(
        'For a tracker without a registry: a JWKS file with the public keys of the registry, read again on SIGHUP.',
      ),
  })
  .prefault({})
  .describe('Signed tokens.')

const registry = z
  .strictObject({
    anonymous_pull: z.boolean().default(false).describe('Lets anyone pull anything without a token.'),
    manifest_max: size().prefault('4MiB').describe('Largest manifest.'),
    blob_max: size().prefault('100GiB').describe('Largest blob.'),
    uploads_max: z.int().positive().default(200).describe('Upload sessions open at once.'),
    upload_ttl: duration()
      .prefault('24h')
      .describe('An upload session without a byte for this long is dropped.'),
    disk_reserve: size()
      .prefault('1GiB')
      .describe('Uploads are refused while less than this is free on the disk.'),
    webseed: z
      .strictObject({
        replies_max: z
          .int()
          .positive()
          .default(16)
          .describe('Webseed replies at once; beyond it 503 with Retry-After.'),
        rate: size().prefault('512MiB').describe('Bytes a second that all webseed replies share.'),
        lease: duration()
          .prefault('20s')
          .describe(
            'A host that was told to use the webseed and shows no progress for this long gives its turn to the next.',
          ),
      })
      .prefault({})
      .describe(
        'The server as the first seed: what you trade is a faster first wave against the uplink of the server.',
      ),
  })
  .prefault({})
  .describe('The registry.')

const enrolment = z
  .strictObject({
    first_token_places: z
      .union([z.literal('any'), z.array(parsed(parsePlace))])
      .default([])
      .describe(
        'Places that a host may claim with the bootstrap token of the first start. Default: none, the address table decides. `any` trusts every host that has the token.',
      ),
    hosts_max: z.int().positive().default(100_000).describe('Hosts enrolled at most.'),
    report_interval: duration()
      .prefault('10s')
      .describe(
        'How often agents report; what you trade is how fresh `status` is, and how soon a new tag is seen, against requests.',
      ),
  })
  .prefault({})
  .describe('How hosts join.')

/** server.yaml. */
export const ServerConfig = z.strictObject({
  roles: z
    .array(z.enum(['tracker', 'registry']))
    .min(1)
    .default(['tracker', 'registry'])
    .describe('What this server is.'),
  public_url: z
    .url({ protocol: /^https?$/ })
    .transform((url) => url.replace(/\/+$/, ''))
    .optional()
    .describe('The URL under which agents and clients reach the main port. Default: made of `http.addr`.'),
  data_dir: z
    .string()
    .optional()
    .describe(
      'Keys, blobs and state. Default: /var/lib/rackswarm/server, or below XDG_STATE_HOME without root.',
    ),
  log_level: z
    .enum(['trace', 'debug', 'info', 'warn', 'error'])
    .default('info')
    .describe('Least severe log line that is written.'),
  metrics_addr: listenAddress()
    .prefault('127.0.0.1:6880')
    .describe('/metrics, /livez, /readyz and /stats.json; no authentication, so keep it private.'),
  announce_interval: duration()
    .prefault('5m')
    .describe('Longest interval between announces; young swarms get shorter ones.'),
  min_announce_interval: duration().prefault('5s').describe('Shortest interval between announces.'),
  http,
  tracker,
  storage,
  topology,
  tokens,
  registry,
  enrolment,
})
export type ServerConfig = z.output<typeof ServerConfig>

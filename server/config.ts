import { z } from 'zod'
import { parseCidr } from '../lib/protocol/cidr.ts'
import { parseIp, isLoopback } from '../lib/protocol/address.ts'
import { parsePlace } from '../lib/protocol/place.ts'
import { Scope, repositoryPattern } from '../lib/client/api.ts'
import { duration, parsed, rate, size } from '../lib/runtime/config.ts'
import { builtInPreHooks } from './tracker/hooks/built-in.ts'
import { isModulePath } from './tracker/load-module.ts'
import type { PrefixTable } from './tracker/prefix-table.ts'
import type { TopologyConfig } from './tracker/topology.ts'
import { createTopology } from './tracker/topology.ts'
import type { RedisAddress } from './redis/connection.ts'

/** `HOST:PORT`, `[IPV6]:PORT`; port 0 lets the system choose. */
export function listenAddress() {
  return parsed((text) => {
    const match = /^(?:\[([0-9a-fA-F:]+)\]|([A-Za-z0-9.-]+)):(\d{1,5})$/.exec(text)
    const port = Number(match?.[3])
    if (!match || port > 65535) throw new Error('need HOST:PORT or [IPV6]:PORT')
    return { host: match[1] ?? match[2] ?? '', port }
  })
}

/** One address or several. */
function listenAddresses() {
  return z.union([listenAddress().transform((address) => [address]), z.array(listenAddress())])
}

/** A route of the tracker: `/announce`, `/t/:name/announce`, `/any/*rest`. */
function route() {
  return z.string().regex(/^\/\S*$/, 'need a path such as /announce')
}

const http = z
  .strictObject({
    addr: listenAddress()
      .prefault('127.0.0.1:6969')
      .describe(
        'The main port: tracker, registry and APIs. A non-loopback address needs `tls` or `insecure_plaintext`.',
      ),
    tracker_addr: listenAddresses()
      .prefault([])
      .describe(
        'Further addresses for announces and scrapes alone, as a list; plaintext, or TLS where `tls_addr` names them too. With `roles: [tracker]` the main port is such an address itself.',
      ),
    tls_addr: listenAddresses()
      .prefault([])
      .describe('Further addresses for announces and scrapes alone, over TLS with the certificate of `tls`.'),
    tls: z
      .strictObject({
        cert: z.string().describe('PEM file with the certificate and its chain.'),
        key: z.string().describe('PEM file with the private key.'),
        main_port: z
          .boolean()
          .default(true)
          .describe('Off: the main port stays plaintext, and only `tls_addr` speaks TLS.'),
        client_ca: z
          .string()
          .optional()
          .describe('PEM file with the authorities whose client certificates are accepted.'),
        client_certificates: z
          .enum(['optional', 'required'])
          .default('optional')
          .describe('With `client_ca`: whether a client without a certificate is turned away.'),
      })
      .optional()
      .describe('TLS 1.2 or newer. The files are read again on SIGHUP and when they change.'),
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
    real_ip_header: z
      .enum(['x-forwarded-for', 'x-real-ip'])
      .default('x-forwarded-for')
      .describe('Which header of trusted proxies says who the client is.'),
    proxy_protocol: z
      .boolean()
      .default(false)
      .describe(
        'Trusted proxies begin each connection with a PROXY protocol header, version 1 or 2. For addresses that serve the tracker alone.',
      ),
    announce_routes: z
      .array(route())
      .min(1)
      .default(['/announce'])
      .describe(
        'Paths of announces; `:name` stands for one segment, `*name` at the end for all that follow.',
      ),
    scrape_routes: z.array(route()).min(1).default(['/scrape']).describe('Paths of scrapes.'),
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

const udp = z
  .strictObject({
    addr: listenAddresses()
      .optional()
      .describe(
        'Where the UDP tracker (BEP 15) listens; [] for nowhere. Default: the main address, if that is loopback.',
      ),
    insecure_plaintext: z
      .boolean()
      .default(false)
      .describe(
        'Says that a non-loopback address is meant although tokens travel over it in plaintext; needed with `tracker.approval: token`.',
      ),
    private_key: z
      .string()
      .min(16, 'need 16 characters or more')
      .optional()
      .describe(
        'Secret of the connection ids. Servers that share it accept the ids of each other. Default: one of its own, in `data_dir`.',
      ),
    private_key_file: z.string().optional().describe('A file (0600) with that secret.'),
    connection_id_lifetime: duration()
      .prefault('2m')
      .describe(
        'How long a connection id is good, 1s to 8h. BEP 15 says two minutes; some clients keep theirs for an hour.',
      ),
    max_clock_skew: duration()
      .prefault('10s')
      .describe('How far ahead the clock of another server that made a connection id may be.'),
  })
  .prefault({})
  .describe('The UDP tracker.')

const topology = z
  .strictObject({
    levels: z
      .array(
        z.union([
          z.string(),
          z.strictObject({
            name: z.string().describe('Its name.'),
            cost: z
              .number()
              .positive()
              .optional()
              .describe(
                'What a byte costs that leaves a node of this level, against the other levels. Default: 1.',
              ),
            capacity: rate()
              .optional()
              .describe('What the uplink of such a node carries a second: 40Gb (bits), 5GB (bytes).'),
          }),
        ]),
      )
      .prefault(['rack'])
      .describe(
        'The levels, nearest first: names such as [rack, row, datacentre]. Every place of `places` has a parent for each level above its own. `{ name: zone, cost: 20, capacity: 40Gb }` in the place of a name also says what it costs to leave a zone; see below.',
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
      .max(2000, 'at most 2000 here: put them into a file, topology.table')
      .default([])
      .describe('Which network is which place; the longest prefix wins.'),
    table: z
      .string()
      .min(1)
      .optional()
      .describe(
        'The same in a CSV file, for up to a million networks; relative to where the configuration lies. Read again on SIGHUP and when it changes; see below.',
      ),
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
      .max(8)
      .default(3)
      .describe(
        'Leechers of each rack that are sent to far peers at once, at most (one for every four, and two at least); the others hold far peers in reserve. More means more cross-rack bytes, fewer a slower first wave.',
      ),
    reserve_peers: z
      .int()
      .min(1)
      .default(4)
      .describe('Far peers that everyone gets besides its rack, so that no rack is an island.'),
    trusted_announcers: z
      .array(parsed(parseCidr))
      .default([])
      .describe(
        'Networks whose announces may say which address they are for (`ip`, `ipv4`, `ipv6`, the IP field over UDP).',
      ),
    scrape_networks: z
      .array(parsed(parseCidr))
      .default([])
      .describe('Networks that may scrape without a token, over UDP too.'),
    full_scrape_networks: z
      .array(parsed(parseCidr))
      .default([])
      .describe('Networks that may ask for all swarms at once: a scrape without infohash.'),
  })
  .prefault({})
  .describe('What the tracker answers.')

const storage = z
  .strictObject({
    name: z
      .string()
      .default('memory')
      .describe(
        'Where swarms are kept: `memory`, `redis` (shared by several servers), or the path of a module that makes a store.',
      ),
    config: z
      .record(z.string(), z.json())
      .prefault({})
      .describe('Settings of the store; those of `memory` and `redis`: docs/configuration.md.'),
  })
  .prefault({})
  .describe('Where swarms are kept.')

/** What `storage.config` may say of the memory store. */
export const MemoryStorage = z.strictObject({
  peers_max: z
    .int()
    .positive()
    .max(100_000_000)
    .default(5_000_000)
    .describe('Peers kept; announces beyond it are answered but not stored. Memory is used as peers come.'),
  swarms_max: z
    .int()
    .positive()
    .max(100_000_000)
    .default(1_000_000)
    .describe('Swarms kept, those remembered for their `downloaded` count included.'),
  snapshot: z
    .boolean()
    .default(true)
    .describe('Keeps the swarms in `data_dir/swarms.snapshot`, so that a restart does not lose them.'),
  snapshot_interval: duration()
    .prefault('1m')
    .describe(
      'Between two snapshots: what you trade is the news of that long, after a crash, against the disk.',
    ),
})

/** What `storage.config` may say of the store in Redis. */
export const RedisStorage = z.strictObject({
  staleness: duration()
    .prefault('5s')
    .describe(
      'How long after Redis named a peer it may be handed out by a server that cannot ask Redis any more; what you trade is more to hand out when Redis goes away against peers that are gone.',
    ),
  degraded_max: z
    .union([z.literal('forever'), duration()])
    .prefault('1h')
    .describe(
      'How long announces are answered from what this server knows itself while Redis does not answer. After that they are refused and /readyz is 503, so that servers which reach Redis take over; docs/operations.md.',
    ),
  reconcile_rate: z
    .int()
    .positive()
    .max(100_000)
    .default(1000)
    .describe('Peers a second that Redis is told of once it answers again, by each thread of each server.'),
  untold_max: z
    .int()
    .positive()
    .max(10_000_000)
    .default(200_000)
    .describe(
      'Peers that Redis has to be told of, kept at most by each thread, some 500 bytes each; the oldest go, and are known again when they announce next.',
    ),
  peers_max: z
    .int()
    .positive()
    .max(100_000_000)
    .default(1_000_000)
    .describe('Peers that this server remembers for the time when Redis does not answer; as with `memory`.'),
  swarms_max: z
    .int()
    .positive()
    .max(100_000_000)
    .default(200_000)
    .describe('Swarms that it remembers for it.'),
})

/** What is refused in a URL of Redis, where everybody who sees the configuration would see it. */
function parseRedisUrl(text: string): { tls: boolean; address: RedisAddress; database: number } {
  const url = URL.parse(text)
  if (url?.protocol === 'unix:' && url.pathname.length > 1)
    return { tls: false, address: { path: decodeURIComponent(url.pathname) }, database: 0 }
  if (!url || !['redis:', 'rediss:'].includes(url.protocol) || url.hostname === '')
    throw new Error('need redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH')
  if (url.username !== '' || url.password !== '')
    throw new Error('no credentials here: put the name into redis.username, the password into a file')
  const database = url.pathname.replace(/^\/$/, '').slice(1)
  if (!/^\d{0,4}$/.test(database) || url.search !== '' || url.hash !== '')
    throw new Error('need at most /NUMBER after the port: the database')
  return {
    tls: url.protocol === 'rediss:',
    address: { host: url.hostname.replace(/^\[(.*)\]$/, '$1'), port: Number(url.port || 6379) },
    database: Number(database),
  }
}

const redis = z
  .strictObject({
    url: z
      .union([parsed(parseRedisUrl).transform((url) => [url]), z.array(parsed(parseRedisUrl)).min(1)])
      .describe(
        'Where it is: redis://HOST:PORT, rediss:// over TLS, unix:///PATH; redis://HOST:PORT/2 for another database. A list of several Sentinels, or nodes of the Cluster.',
      ),
    mode: z
      .enum(['single', 'sentinel', 'cluster'])
      .default('single')
      .describe('One server; the primary that the Sentinels of `url` know; a Redis Cluster.'),
    username: z.string().optional().describe('The user of its ACL. Default: the default one.'),
    password_file: z
      .string()
      .optional()
      .describe('A file (0600) with the password. Or RACKSWARM_REDIS_PASSWORD in the environment.'),
    sentinel: z
      .strictObject({
        name: z.string().min(1).describe('What the Sentinels call the primary.'),
        username: z.string().optional().describe('Their user.'),
        password_file: z.string().optional().describe('A file (0600) with their password.'),
      })
      .optional()
      .describe('With `mode: sentinel`.'),
    ca: z.string().optional().describe('PEM file with the authority of its certificate, if it is your own.'),
    client_cert: z.string().optional().describe('PEM file with a client certificate, if it asks for one.'),
    client_key: z.string().optional().describe('PEM file with its private key.'),
    insecure_plaintext: z
      .boolean()
      .default(false)
      .describe('Says that a Redis on another machine without TLS is meant.'),
    key_prefix: z
      .string()
      .regex(/^[\w.:-]{1,64}$/, 'need up to 64 of A-Z a-z 0-9 _ . : -')
      .default('rackswarm:')
      .describe('What every key begins with. Servers with the same one share their swarms and their state.'),
    connect_timeout: duration().prefault('2s').describe('How long a connection may take.'),
    command_timeout: duration()
      .prefault('500ms')
      .describe(
        'A command that takes longer has failed; what you trade is the time that an announce may wait against answers from what this server knows itself.',
      ),
    calls_max: z
      .int()
      .positive()
      .default(10_000)
      .describe('Commands under way at once, in each thread; beyond it they fail at once.'),
  })
  .optional()
  .describe('A Redis that several servers share, for `storage` and `state`: configs/server.redis.yaml.')

const state = z
  .strictObject({
    name: z
      .enum(['sqlite', 'redis'])
      .default('sqlite')
      .describe('`sqlite`: in `data_dir`, for one server. `redis`: shared by several.'),
  })
  .prefault({})
  .describe('Where hosts, tokens, deny lists, pins and leases are kept.')

/** A hook that ships with the tracker, by its name, or one of somebody else's, by the path of its module. */
const hook = z.strictObject({
  name: z.string().min(1).describe('Its name, or the path of a module: ./hook.js, /etc/rackswarm/hook.js.'),
  options: z.record(z.string(), z.json()).prefault({}).describe('Its options.'),
})

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
    peer_ttl: duration()
      .prefault('24h')
      .describe(
        'Life of the tokens that agents show each other. For so long hosts go on among themselves while the server is away, and for so long a host that was revoked may fetch what it was granted before.',
      ),
    torrent_ttl: duration()
      .prefault('24h')
      .describe('Life of the announce token inside a .torrent, unless asked otherwise.'),
    host_ttl: duration().prefault('30d').describe('Life of a host credential; hosts renew at two thirds.'),
    api_ttl: duration()
      .prefault('90d')
      .describe('Life of a token of `deployctl token create`, unless asked otherwise.'),
    clock_tolerance: duration().prefault('120s').describe('How far clocks may differ.'),
    key_lead: duration()
      .prefault('10m')
      .describe(
        'How long a new signing key is published before it signs: twice what verifiers elsewhere take to look again (`keys_refresh`, 5m).',
      ),
    key_rotation: duration()
      .optional()
      .describe(
        'A signing key of this age is followed by a new one. Default: only `deployctl keys rotate` does it.',
      ),
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
        'For a tracker without a registry: a JWKS file with the public keys of the registry, read again when it changes and on SIGHUP.',
      ),
    keys_url: z
      .url({ protocol: /^https?$/ })
      .optional()
      .describe('The same from a URL: `https://registry.example.com/.well-known/jwks.json`.'),
    keys_ca: z.string().optional().describe('PEM file with the authority of that URL, if it is your own.'),
    keys_refresh: duration()
      .prefault('5m')
      .describe('How often the URL is fetched; an unknown key is looked for at once, at most every 10 s.'),
    compat: z
      .enum(['none', 'chihaya'])
      .default('none')
      .describe(
        '`chihaya`: also takes announce tokens as Quay signed them for chihaya: RS256, without an end. Such a token is good as long as its key.',
      ),
    ticket_secret_file: z
      .string()
      .optional()
      .describe(
        'A file (0600) with the secret of the tickets that spare a restarted server the signatures; servers that share it share them. Default: one of its own, in `data_dir`.',
      ),
  })
  .prefault({})
  .describe('Signed tokens.')

/** What a claim of a token must say. */
const claim = z.union(
  [
    z.string(),
    z.array(z.string()).min(1),
    z.strictObject({ prefix: z.string().min(1) }),
    z.strictObject({ glob: z.string().min(1).max(300) }),
  ],
  { error: "need text, a list of texts, { prefix: … } or { glob: … }; put numbers in quotes: '123'" },
)

const trusted = z.strictObject({
  name: z
    .string()
    .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/, 'need up to 64 of A-Z a-z 0-9 . _ -')
    .describe('Shows in logs and as the name of the tokens.'),
  issuer: z.url({ protocol: /^https?$/ }).describe('The `iss` of its tokens, letter for letter.'),
  audience: z.string().min(1).optional().describe('The `aud` of its tokens. Default: `public_url`.'),
  jwks_url: z
    .url({ protocol: /^https?$/ })
    .optional()
    .describe('Where its keys are. Default: what its OpenID configuration says.'),
  jwks_file: z.string().optional().describe('A JWKS file with its keys instead, read again when it changes.'),
  ca: z.string().optional().describe('PEM file with the authority of these URLs, if it is your own.'),
  claims: z
    .record(z.string(), claim)
    .refine(
      (claims) => Object.keys(claims).length > 0,
      'need at least one: else every token of the issuer would do',
    )
    .describe('What its tokens must say: text, a list of which one fits, `{ prefix: … }` or `{ glob: … }`.'),
  grants: z.array(Scope).min(1).max(50).describe('Scopes that the bearer gets.'),
  ttl: duration().prefault('10m').describe('For how long.'),
})
/** A registry is at the root of its host (OCI distribution-spec, "Endpoints"). */
function isOrigin(text: string): boolean {
  const url = URL.parse(text)
  return url !== null && url.href === `${url.origin}/`
}

const retentionRule = z
  .strictObject({
    repositories: z.array(repositoryPattern).min(1),
    tags: z
      .string()
      .regex(/^[\w.*-]{1,128}$/, 'need a tag, * for any characters')
      .optional(),
    keep_last: z.int().positive().optional(),
    keep_newer_than: duration().optional(),
    keep_deployed: z.boolean().default(true),
  })
  .refine(
    ({ keep_last, keep_newer_than }) => keep_last !== undefined || keep_newer_than !== undefined,
    'need keep_last or keep_newer_than: a rule with neither would remove every tag',
  )

const registry = z
  .strictObject({
    shared_dir: z
      .string()
      .optional()
      .describe(
        'A directory that several servers share, over NFS for instance: blobs, manifests, tags, keys, audit logs and secrets are there instead of in `data_dir`, which stays of each server alone. Needs `state.name: redis`. See docs/operations.md.',
      ),
    shared_settle: duration()
      .refine((ms) => ms >= 100, 'need 100ms or more')
      .prefault('10s')
      .describe(
        'With shared_dir: no server sees the directory as it was longer ago than half of this. Twice what clients of the file system may cache (actimeo of NFS); what you trade is how long removals take.',
      ),
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
    trust: z
      .array(trusted)
      .max(1000)
      .default([])
      .describe(
        'OpenID Connect issuers whose tokens can be exchanged for short-lived ones of this server: CI jobs publish without a secret. Entries that fit the same token add up. Examples: docs/security.md.',
      ),
    audit: z
      .strictObject({
        file_max: size()
          .prefault('32MiB')
          .describe('A larger `audit.log` is put aside, and a new one begun.'),
        files_max: z.int().min(1).max(10_000).default(8).describe('Files kept; the oldest goes.'),
      })
      .prefault({})
      .describe('The log of who did what, in `data_dir`.'),
    upstreams: z
      .array(
        z.strictObject({
          name: z
            .string()
            .regex(/^[a-z0-9][a-z0-9._-]{0,63}$/, 'need up to 64 of a-z 0-9 . _ -')
            .describe('Its name, in logs and metrics.'),
          url: z
            .url({ protocol: /^https?$/ })
            .refine(isOrigin, 'need https://HOST or https://HOST:PORT, and nothing after it')
            .describe('Where it is: https://registry.example.com.'),
          repositories: z
            .array(repositoryPattern)
            .min(1)
            .max(1000)
            .describe('What is pulled from it: names, `team/*`, or `*`. They have the same names here.'),
          credential_file: z.string().optional().describe('A file (0600) with one line USER:PASSWORD.'),
          ca: z
            .string()
            .optional()
            .describe('PEM file with the authority of its certificate, if it is your own.'),
          insecure_plaintext: z
            .boolean()
            .default(false)
            .describe('Says that http:// to another machine is meant.'),
        }),
      )
      .max(100)
      .default([])
      .describe(
        'Registries that this one pulls from when it is asked for what it does not have, or told of a push: docs/registries.md. The first that has a repository is asked.',
      ),
    tag_ttl: duration()
      .prefault('1m')
      .describe('How long a tag of an upstream is taken to be what it was when the upstream was last asked.'),
    reconcile_interval: z
      .union([z.literal('off'), duration()])
      .prefault('off')
      .describe(
        'How often all tags of the upstreams are looked at and pulled where they differ, for pushes that no notification told of.',
      ),
    anonymous_notifications: z
      .boolean()
      .default(false)
      .describe(
        'Takes notifications and preheat jobs from whoever sends no credential, for Harbor instances without authentication. They can make the server pull what its upstreams have, and nothing else.',
      ),
    webseed: z
      .strictObject({
        replies_max: z
          .int()
          .positive()
          .default(16)
          .describe(
            'Webseed replies at once, beyond it 503 with Retry-After; and hosts that may use the webseed at once.',
          ),
        rate: size().prefault('512MiB').describe('Bytes a second that all webseed replies share.'),
        lease: duration()
          .prefault('15s')
          .describe(
            'A host that was told to use the webseed and shows no progress for this long gives its turn to the next.',
          ),
      })
      .prefault({})
      .describe(
        'The server as the first seed: what you trade is a faster first wave against the uplink of the server.',
      ),
    gc: z
      .strictObject({
        enabled: z
          .boolean()
          .default(true)
          .describe('Off: only `deployctl registry gc` collects, and retention waits for it too.'),
        interval: duration()
          .refine((ms) => ms >= 1000, 'need 1s or more')
          .prefault('1h')
          .describe('Between two runs; each reads every manifest.'),
        grace: duration()
          .prefault('24h')
          .describe(
            'What nothing needs stays for so long after somebody pushed, mounted or asked for it last. Longer than any push takes; what you trade is disk against time to put back what went by mistake.',
          ),
      })
      .prefault({})
      .describe('What no tag, pin or host needs is removed.'),
    retention: z
      .array(retentionRule)
      .max(1000)
      .default([])
      .describe(
        'Which tags stay. The first rule that covers a tag decides; `latest`, pinned tags and those that no rule covers stay. See docs/operations.md.',
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

const Settings = z.strictObject({
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
  server_name: z
    .string()
    .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/, 'need up to 63 of A-Z a-z 0-9 . _ -')
    .optional()
    .describe(
      'What this server is called among those that share a directory and a Redis; no two may have one name. Default: the name of the machine and something random, kept in `data_dir`.',
    ),
  log_level: z
    .enum(['trace', 'debug', 'info', 'warn', 'error'])
    .default('info')
    .describe('Least severe log line that is written.'),
  metrics_addr: z
    .union([z.literal('none'), listenAddress()])
    .prefault('127.0.0.1:6880')
    .describe('/metrics, /livez, /readyz and /stats.json; no authentication, so keep it private.'),
  announce_interval: duration()
    .prefault('5m')
    .describe('Longest interval between announces; young swarms get shorter ones.'),
  min_announce_interval: duration().prefault('5s').describe('Shortest interval between announces.'),
  workers: z
    .int()
    .min(1)
    .max(64)
    .default(1)
    .describe(
      'Threads that answer announces, on the same ports and the same swarms. More than one needs `roles: [tracker]`, and ports that are theirs alone.',
    ),
  shutdown_delay: duration()
    .refine((ms) => ms <= 300_000, 'need 5m or less')
    .prefault('0s')
    .describe(
      'At SIGTERM: how long everything is still answered while /readyz says 503 already. As long as what is in front of several servers takes to see that; 0s where nothing is. See docs/operations.md.',
    ),
  reuse_port: z
    .boolean()
    .default(false)
    .describe(
      'Lets another server of the same user listen on the same addresses, so that a new one takes over before the old one ends. See docs/operations.md.',
    ),
  http,
  udp,
  tracker,
  prehooks: z
    .array(hook)
    .default([])
    .describe(
      'What an announce or scrape must pass, in order, after its token. Those that ship: docs/hooks.md.',
    ),
  posthooks: z.array(hook).default([]).describe('What is told of announces once they are answered.'),
  storage,
  redis,
  state,
  topology,
  tokens,
  registry,
  enrolment,
})
type Settings = z.output<typeof Settings>

/** server.yaml. */
export const ServerConfig = Settings.check(checkTogether)
export type ServerConfig = z.output<typeof ServerConfig>

/** The longest interval that the store's wheel holds the life of a peer for. */
const announceIntervalMaxMs = 3 * 60 * 60 * 1000

/** Where hosts are; `table` stands for `topology.prefixes`, with what `topology.table` says besides. */
export function topologyOf({ topology }: Pick<Settings, 'topology'>, table?: PrefixTable): TopologyConfig {
  return {
    levels: topology.levels,
    places: topology.places,
    prefixes: table ?? topology.prefixes,
    ipv4PrefixLength: topology.ipv4_prefix_length,
    ipv6PrefixLength: topology.ipv6_prefix_length,
  }
}

/** What no setting says alone. */
function checkTogether({ value: config, issues }: { value: Settings; issues: z.core.$ZodRawIssue[] }): void {
  const fault = (path: (string | number)[], message: string) => {
    issues.push({ code: 'custom', path, message, input: config })
  }
  const isLocal = (host: string) => {
    const ip = parseIp(host)
    return host === 'localhost' || (ip !== undefined && isLoopback(ip))
  }
  const { http, udp, tracker, tokens, roles } = config
  const plaintext = [
    ...(http.tls?.main_port === true ? [] : [{ path: ['http', 'addr'], host: http.addr.host }]),
    ...http.tracker_addr.map(({ host }) => ({ path: ['http', 'tracker_addr'], host })),
  ]
  for (const { path, host } of plaintext)
    if (!isLocal(host) && !http.insecure_plaintext)
      fault(
        path,
        `${host} is reachable from outside, where plaintext shows every token: set http.tls, or http.insecure_plaintext: true if something in front speaks TLS`,
      )
  for (const { host } of udp.addr ?? [])
    if (!isLocal(host) && tracker.approval === 'token' && !udp.insecure_plaintext)
      fault(
        ['udp', 'addr'],
        `${host} is reachable from outside, and UDP shows every token: set udp.insecure_plaintext: true if that is meant`,
      )
  const { upstreams } = config.registry
  for (const [i, { name, url, insecure_plaintext }] of upstreams.entries()) {
    const { protocol, hostname } = new URL(url)
    if (protocol === 'http:' && !isLocal(hostname.replace(/^\[(.*)\]$/, '$1')) && !insecure_plaintext)
      fault(
        ['registry', 'upstreams', i, 'url'],
        `${hostname} is another machine, and http:// shows every credential: use https://, or set insecure_plaintext: true if that is meant`,
      )
    if (upstreams.findIndex((other) => other.name === name) < i)
      fault(['registry', 'upstreams', i, 'name'], `there are two upstreams of the name ${name}`)
  }
  if (http.tls_addr.length > 0 && http.tls === undefined)
    fault(['http', 'tls_addr'], 'needs a certificate: set http.tls')
  if (udp.private_key !== undefined && udp.private_key_file !== undefined)
    fault(['udp', 'private_key_file'], 'the secret is in udp.private_key already: leave one of them out')
  if (udp.connection_id_lifetime < 1000 || udp.connection_id_lifetime > 28_800_000)
    fault(['udp', 'connection_id_lifetime'], 'need 1s to 8h')
  if (udp.max_clock_skew > 28_800_000) fault(['udp', 'max_clock_skew'], 'need 8h or less')
  if (config.announce_interval > announceIntervalMaxMs) fault(['announce_interval'], 'need 3h or less')
  if (config.min_announce_interval > config.announce_interval)
    fault(['min_announce_interval'], 'is longer than announce_interval')
  if (tokens.keys_file !== undefined && tokens.keys_url !== undefined)
    fault(['tokens', 'keys_url'], 'the keys come from tokens.keys_file already: leave one of them out')
  for (const [i, entry] of config.registry.trust.entries()) {
    const at = ['registry', 'trust', i]
    if (entry.jwks_url !== undefined && entry.jwks_file !== undefined)
      fault([...at, 'jwks_file'], 'the keys come from jwks_url already: leave one of them out')
    if (entry.ttl < 60_000 || entry.ttl > 3_600_000) fault([...at, 'ttl'], 'need 1m to 1h; renewing is cheap')
    // `sub` changed its form once, and a name that was given up can be taken by another: ids stay.
    if (
      entry.issuer === 'https://token.actions.githubusercontent.com' &&
      !['repository_id', 'repository_owner_id'].some((id) => isExact(entry.claims[id]))
    )
      fault(
        [...at, 'claims'],
        'need repository_id (or repository_owner_id): names on GitHub can change hands',
      )
    const first = config.registry.trust.find(({ issuer }) => issuer === entry.issuer)
    for (const key of ['jwks_url', 'jwks_file', 'ca'] as const)
      if (first && first[key] !== entry[key])
        fault([...at, key], `is another one than that of ${first.name}, which has the same issuer`)
  }
  const nested = (path: (string | number)[], schema: z.ZodType, value: unknown) => {
    for (const issue of schema.safeParse(value).error?.issues ?? [])
      for (const { at, message } of flattened(issue)) fault([...path, ...at], message)
  }
  if (config.registry.shared_dir !== undefined && config.state.name !== 'redis')
    fault(
      ['registry', 'shared_dir'],
      'servers that share a directory share their state too: set state.name: redis',
    )
  if (config.redis) checkRedis(config.redis, isLocal, (path, message) => fault(['redis', ...path], message))
  for (const user of ['storage', 'state'] as const)
    if (config[user].name === 'redis' && config.redis === undefined)
      fault([user, 'name'], 'needs a Redis: say where it is in redis.url')
  if (config.storage.name === 'memory') nested(['storage', 'config'], MemoryStorage, config.storage.config)
  else if (config.storage.name === 'redis') nested(['storage', 'config'], RedisStorage, config.storage.config)
  else if (!isModulePath(config.storage.name))
    fault(
      ['storage', 'name'],
      'there is no such store: need memory, redis, or the path of a module such as ./store.js',
    )
  for (const [i, { name, options }] of config.prehooks.entries()) {
    const known = builtInPreHooks.find((definition) => definition.name === name)
    if (known) nested(['prehooks', i, 'options'], known.options, options)
    else if (!isModulePath(name))
      fault(
        ['prehooks', i, 'name'],
        `there is no such hook: need ${builtInPreHooks.map((definition) => definition.name).join(', ')}, or the path of a module such as ./hook.js`,
      )
  }
  for (const [i, { name }] of config.posthooks.entries())
    if (!isModulePath(name))
      fault(
        ['posthooks', i, 'name'],
        'none ship with the tracker: need the path of a module such as ./hook.js',
      )
  const hasKeys = tokens.keys_file !== undefined || tokens.keys_url !== undefined
  if (roles.includes('registry')) {
    for (const key of ['keys_file', 'keys_url', 'keys_ca'] as const)
      if (tokens[key] !== undefined)
        fault(['tokens', key], 'a server with a registry has keys of its own: leave it out')
  } else if (tracker.approval === 'token' && !hasKeys) {
    fault(
      ['tokens', 'keys_file'],
      'a tracker without a registry needs the public keys of one, from tokens.keys_file or tokens.keys_url, or tracker.approval: none',
    )
  }
  try {
    createTopology(topologyOf(config))
  } catch (error) {
    for (const message of (error as Error).message.split('\n')) {
      const [, path = 'topology', what = message] = /^(topology\.\S+): (.*)$/.exec(message) ?? []
      fault(path.split('.'), what)
    }
  }
  if (config.reuse_port && roles.includes('registry') && config.state.name !== 'redis')
    fault(
      ['reuse_port'],
      'two servers would share state.sqlite: need roles: [tracker], or state.name: redis and a data_dir for each',
    )
  if (config.workers > 1 && roles.includes('registry'))
    fault(['workers'], 'more than one needs roles: [tracker]; run the registry as a server of its own')
}

function checkRedis(
  redis: NonNullable<Settings['redis']>,
  isLocal: (host: string) => boolean,
  fault: (path: string[], message: string) => void,
): void {
  const { mode, url } = redis
  if (mode === 'single' && url.length > 1)
    fault(['url'], 'one is enough: or set redis.mode to sentinel or cluster')
  if (mode !== 'single' && url.some(({ address }) => 'path' in address))
    fault(['url'], 'a socket is for redis.mode: single')
  if (mode === 'cluster' && url.some(({ database }) => database !== 0))
    fault(['url'], 'a Cluster has no databases but 0')
  if (url.some(({ tls, database }) => tls !== url[0]?.tls || database !== url[0].database))
    fault(['url'], 'all of them need the same scheme and database')
  for (const { tls, address } of url)
    if (!tls && 'host' in address && !isLocal(address.host) && !redis.insecure_plaintext)
      fault(
        ['url'],
        `${address.host} is another machine, and redis:// shows passwords and peers: use rediss://, or set insecure_plaintext: true if that is meant`,
      )
  if ((mode === 'sentinel') !== (redis.sentinel !== undefined))
    fault(['sentinel'], mode === 'sentinel' ? 'needs redis.sentinel.name' : 'is for redis.mode: sentinel')
  if ((redis.client_cert === undefined) !== (redis.client_key === undefined))
    fault(['client_key'], 'a client certificate needs both: client_cert and client_key')
}

function isExact(claim: z.output<typeof trusted>['claims'][string] | undefined): boolean {
  return typeof claim === 'string' || Array.isArray(claim)
}

/** An unknown key is named by itself, as the reader of the file does it. */
function flattened(issue: z.core.$ZodIssue): { at: (string | number)[]; message: string }[] {
  const at = issue.path.map((key) => (typeof key === 'symbol' ? String(key) : key))
  if (issue.code === 'unrecognized_keys')
    return issue.keys.map((key) => ({ at: [...at, key], message: 'there is no such setting' }))
  return [{ at, message: issue.message }]
}

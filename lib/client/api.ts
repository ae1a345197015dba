// The bodies of /api/v1 and of the agent's control API, as both ends know them. docs/protocol.md tells them in words.
import { z } from 'zod'
import { isReference, repositoryPatternSource } from '../protocol/reference.ts'

const digest = z.string().regex(/^sha256:[0-9a-f]{64}$/, 'need sha256: and 64 lower-case hex digits')
const infoHash = z.string().regex(/^[0-9a-f]{40}$/, 'need 40 lower-case hex digits')
const hostName = z.string().regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/, 'need up to 128 of A-Z a-z 0-9 . _ -')
const place = z
  .string()
  .regex(/^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$/, 'need up to 64 of A-Z a-z 0-9 . _ : / -')
const reference = z.string().max(400).refine(isReference, 'need NAME[:TAG][@DIGEST]')
/** As in scopes, rules and upstreams. */
export const repositoryPattern = z
  .string()
  .max(257)
  .regex(new RegExp(`^${repositoryPatternSource}$`), 'need a repository, team/* or *')
const time = z.iso.datetime()
const count = z.int().nonnegative()

/** Every error of /api/v1 and of the control API. `hint` says what to do next. */
export const ApiErrorBody = z.object({
  error: z.object({ code: z.string(), message: z.string(), hint: z.string().optional() }),
})

/** POST /api/v1/enroll: no Authorization, the bootstrap token is the proof. */
export const EnrollRequest = z.strictObject({
  bootstrapToken: z.string().min(1).max(256),
  host: hostName,
  /** The place the host says it is at; counts only where the bootstrap token allows it. */
  place: place.optional(),
})
/** Also the answer of POST /api/v1/hosts/self/renew. */
export const HostCredential = z.object({
  host: hostName,
  /** A signed JWT, `typ: host+jwt`. */
  credential: z.string(),
  /** The operator's word on where the host is; absent where the address table decides. */
  place: place.optional(),
  expiresAt: time,
})

/** Bytes of one fetch by where they came from; the server is a place of its own. */
export const BytesBySource = z.object({ ownRack: count, otherRacks: count, webseed: count })

/** How one followed or requested reference stands on a host. */
export const HeldReference = z.object({
  /** NAME:TAG. */
  reference,
  /** Manifest digest that the state speaks of. */
  digest,
  state: z.enum(['waiting', 'fetching', 'held', 'failed']),
  /** Bytes verified of the release's blobs, and all of them. */
  bytesDone: count,
  bytesTotal: count,
  bytes: BytesBySource,
  /** How long the fetch took, or has taken so far. */
  tookMs: count,
  /** Why it waits or failed, for the person who must find out. */
  reason: z.string().max(500).optional(),
})

/** POST /api/v1/hosts/self/report, with the host's credential, every 10 s. */
export const HostReport = z.strictObject({
  agentVersion: z.string().max(40),
  /** The place the agent believes in: the server's own word, echoed so that a mismatch shows. */
  place: place.optional(),
  /** References this host follows: NAME:TAG. */
  follow: z.array(reference).max(1000),
  held: z.array(HeldReference).max(1000),
  diskUsedBytes: count,
  diskQuotaBytes: count,
})
export const ReportReply = z.object({
  /** The tracker's epoch; when it changes the agent announces all it holds again. */
  epoch: z.string(),
  /** Manifest digest of each followed tag; null where there is no such tag or the host may not have it. */
  tags: z.record(z.string(), digest.nullable()),
  /** Where the server takes the host to be; for telling own-rack bytes from others. */
  place: z.string(),
  /** When to report next, before jitter. */
  reportIntervalSeconds: z.number().positive(),
  /** That of RevokedTorrentList; older servers say none. */
  revokedTorrents: z.string().optional(),
  serverTime: time,
})

/** POST /api/v1/swarm-grants, with a host credential or a pull token; again to renew. */
export const GrantRequest = z.strictObject({
  repository: z.string(),
  digest,
  /** Whole seconds without a byte, where a stuck fetch asks for the webseed. */
  stalledSeconds: count.optional(),
  /** The first piece of a range that the host was given, all of which it has asked the webseed for. Older agents say true, of what they were given last. */
  rangeDone: z.union([count, z.boolean()]).optional(),
  /** SHA-256 of the certificate that the host shows to other agents, base64url: the peer token will name it. */
  certificate: z
    .string()
    .regex(/^[\w-]{43}$/, 'need the SHA-256 of a certificate, base64url')
    .optional(),
})
export const SwarmGrant = z.object({
  infohash: infoHash,
  /** A .torrent without announce and webseed URLs, base64. */
  metainfo: z.base64(),
  /** Without the token. */
  announceUrl: z.url(),
  /** The announce token. */
  token: z.string(),
  expiresAt: time,
  /** What the host shows to other agents, a secret; older servers give none. */
  peerToken: z.string().optional(),
  /** Holds a token in its path: a secret. */
  webseedUrl: z.url(),
  /** Whether the webseed may be used now. */
  webseed: z.boolean(),
  /** Which pieces; older servers give all. */
  webseedRange: z.object({ firstPiece: count, pieceCount: count }).optional(),
})

/** POST /api/v1/announce-tokens: a signed announce URL for a client of one's own. Either infohash, or repository and digest. */
export const AnnounceTokenRequest = z.strictObject({
  infohash: z.string().optional(),
  repository: z.string().optional(),
  digest: digest.optional(),
  ttlSeconds: count.min(1).optional(),
  rack: place.optional(),
  cidr: z.string().max(64).optional(),
})
export const AnnounceTokenReply = z.object({
  infohash: infoHash,
  /** With the token, ready for a client. */
  announceUrl: z.url(),
  token: z.string(),
  expiresAt: time,
})

/** A scope: `admin`, or `pull:PREFIX`, `publish:PREFIX`, `delete:PREFIX` where PREFIX is a repository, `team/*`, or `*`. */
export const Scope = z
  .string()
  .max(300)
  .regex(
    new RegExp(`^(admin|(pull|publish|delete):${repositoryPatternSource})$`),
    'need admin, pull:PREFIX, publish:PREFIX or delete:PREFIX',
  )

/** POST /api/v1/tokens (admin). */
export const CreateTokenRequest = z.strictObject({
  /** Who holds it: shows in logs and lists. */
  name: hostName,
  scopes: z.array(Scope).min(1).max(50),
  ttlSeconds: count.min(1).optional(),
})
export const CreatedToken = z.object({ id: z.string(), token: z.string(), expiresAt: time })
/** GET /api/v1/tokens (admin): never the tokens themselves. */
export const TokenList = z.object({
  tokens: z.array(
    z.object({
      id: z.string(),
      name: z.string(),
      scopes: z.array(z.string()),
      createdAt: time,
      expiresAt: time,
      revoked: z.boolean(),
    }),
  ),
})

/**
 * Answer of POST /api/v1/token-exchange (RFC 8693), a form with `grant_type`, `subject_token` and `subject_token_type`: no
 * Authorization, the token of an issuer in `registry.trust` is the proof.
 */
export const TokenExchangeReply = z.object({
  access_token: z.string(),
  issued_token_type: z.string(),
  token_type: z.string(),
  /** Seconds. */
  expires_in: count,
  /** Separated by spaces. */
  scope: z.string(),
})

/** GET /api/v1/audit (admin): lines of the audit log after line `after` and not before `since`. */
export const AuditQuery = z.strictObject({
  after: z.coerce.number().pipe(count).optional(),
  since: time.optional(),
  limit: z.coerce.number().pipe(count.min(1)).optional(),
  /** Of which server, where several write one each. */
  log: z.string().max(100).optional(),
})
export const AuditReply = z.object({
  /** As they stand in the file, for whoever checks their chain; each is an AuditLine. */
  lines: z.array(z.string()),
  /** `after` of the next page; absent on the last. */
  next: count.optional(),
  /** Where several servers write one each: the names of all, for `log`. Then the lines are of the one that was asked for, or of none. */
  logs: z.array(z.string()).optional(),
})
export const AuditLine = z.object({
  seq: count,
  time,
  /** SHA-256 of the line before. */
  prev: z.string(),
  who: z.object({ kind: z.string(), name: z.string(), credential: z.string().optional() }),
  address: z.string().optional(),
  action: z.string(),
  target: z.string(),
  /** A line is written before the act: `allowed`; one that failed then has a second line that names the first. */
  outcome: z.enum(['allowed', 'failed']),
  of: count.optional(),
  details: z.record(z.string(), z.unknown()).optional(),
})

/** GET /api/v1/keys (admin): the signing keys, without their private parts. */
export const KeyInfo = z.object({
  kid: z.string(),
  algorithm: z.string(),
  /** `next` is published and signs later, `retiring` verifies what it has signed. */
  state: z.enum(['next', 'active', 'retiring']),
  createdAt: time,
  since: time,
  /** When a next key becomes active, and a retiring one goes. */
  dueAt: time.optional(),
})
export const KeyList = z.object({ keys: z.array(KeyInfo) })
/** POST /api/v1/keys/rotate (admin). DELETE /api/v1/keys/KID revokes one. */
export const RotateKeyRequest = z.strictObject({
  algorithm: z.enum(['ES256', 'Ed25519', 'RS256']).optional(),
  /** Has the new key sign at once: verifiers elsewhere learn of it when they meet it. */
  now: z.boolean().optional(),
})
/** POST /api/v1/keys (admin): a private key, PEM or JWK. */
export const ImportKeyRequest = z.strictObject({
  key: z.string().max(32 * 1024),
  /** Default: the name that a JWK gives itself, else its thumbprint. */
  kid: z
    .string()
    .regex(/^[\w.:=-]{1,128}$/, 'need up to 128 of A-Z a-z 0-9 _ . : = -')
    .optional(),
  /** Never signs; only what it has signed elsewhere counts. */
  verifyOnly: z.boolean().optional(),
})

/** PUT and DELETE /api/v1/revoked-torrents/INFOHASH (admin). */
export const RevokeTorrentRequest = z.strictObject({ reason: z.string().max(200).optional() })
/** GET /api/v1/revoked-torrents: torrents that are no longer shared. `version` changes with each change, and is in each ReportReply. */
export const RevokedTorrentList = z.object({
  version: z.string(),
  torrents: z.array(z.object({ infohash: infoHash, revokedAt: time, reason: z.string().optional() })),
})

/** POST /api/v1/bootstrap-tokens (admin). */
export const CreateBootstrapTokenRequest = z.strictObject({
  /** Places a host may claim with it; `any` lets hosts name their own. Default: none. */
  places: z.union([z.literal('any'), z.array(place).max(1000)]).optional(),
  /** Repositories the enrolled hosts may fetch, as in scopes. Default: `["*"]`. */
  repositories: z.array(repositoryPattern).min(1).max(100).optional(),
  usesMax: count.min(1).optional(),
  ttlSeconds: count.min(1).optional(),
})
export const CreatedBootstrapToken = z.object({ id: z.string(), bootstrapToken: z.string(), expiresAt: time })

/** GET /api/v1/bootstrap-tokens (admin): never the tokens themselves. DELETE /api/v1/bootstrap-tokens/ID revokes one. */
export const BootstrapTokenList = z.object({
  bootstrapTokens: z.array(
    z.object({
      id: z.string(),
      places: z.union([z.literal('any'), z.array(z.string())]),
      repositories: z.array(z.string()),
      /** Absent: any number. */
      usesLeft: count.optional(),
      expiresAt: time,
    }),
  ),
})

/** GET /api/v1/releases: what a caller may pull, newest first. */
export const Release = z.object({
  repository: z.string(),
  tag: z.string(),
  /** Of the manifest. */
  digest,
  publishedAt: time,
  sizeBytes: count,
  blobs: z.array(
    z.object({
      digest,
      sizeBytes: count,
      /** File name, `org.opencontainers.image.title`. */
      title: z.string().optional(),
      /** Absent for blobs that travel over plain HTTP. */
      infohash: infoHash.optional(),
    }),
  ),
})
export const ReleaseList = z.object({ releases: z.array(Release) })

/** GET /api/v1/releases/status?reference=NAME[:TAG|@DIGEST]: who has it. The fleet: hosts heard in the last 60 s that follow or hold it. */
export const ReleaseStatus = z.object({
  reference: z.string(),
  digest,
  fleet: z.object({ total: count, held: count, fetching: count, failed: count, waiting: count }),
  /** Servers, or `Redis`, that did not say what hosts report to them: the counts are without those. Absent where all did. */
  unheard: z.array(z.string()).optional(),
  racks: z.array(
    z.object({
      place: z.string(),
      total: count,
      held: count,
      fetching: count,
      failed: count,
      waiting: count,
      bytes: BytesBySource,
    }),
  ),
  hosts: z.array(z.object({ host: z.string(), place: z.string(), seenAt: time, held: HeldReference })),
})

/** GET /api/v1/hosts (admin). DELETE /api/v1/hosts/NAME revokes its credential, and with ?forget=1 then frees the name. */
export const HostList = z.object({
  hosts: z.array(
    z.object({
      host: z.string(),
      place: z.string(),
      address: z.string().optional(),
      enrolledAt: time,
      seenAt: time.optional(),
      agentVersion: z.string().optional(),
      revoked: z.boolean(),
    }),
  ),
})

/** What a collection removed, or would: a tag by a retention rule, a manifest, a blob from a repository, the bytes of a blob. */
export const GcItem = z.object({
  kind: z.enum(['tag', 'manifest', 'link', 'blob']),
  /** Absent for the bytes, which are of all repositories. */
  repository: z.string().optional(),
  tag: z.string().optional(),
  digest,
  sizeBytes: count.optional(),
  reason: z.string(),
})
export const GcReport = z.object({
  dryRun: z.boolean(),
  startedAt: time,
  tookMs: count,
  graceSeconds: z.number().nonnegative(),
  /** What went, or would. */
  gone: z.object({ tags: count, manifests: count, links: count, blobs: count, bytes: count }),
  kept: z.object({ blobs: count, bytes: count }),
  /** Of what was kept: what nothing but the grace period keeps. */
  waiting: z.object({ blobs: count, bytes: count }),
  /** The first thousand. */
  items: z.array(GcItem),
  /** Repositories that were left alone, and why. */
  faults: z.array(z.object({ repository: z.string(), message: z.string() })),
})

/** POST /api/v1/gc (admin): collects, or says what would go. Answers as GET does, when it has ended or after ten seconds. */
export const GcRequest = z.strictObject({ dryRun: z.boolean().optional() })
/** GET /api/v1/gc (admin). */
export const GcStatus = z.object({
  running: z.object({ startedAt: time, dryRun: z.boolean() }).optional(),
  lastRun: GcReport.optional(),
  lastDryRun: GcReport.optional(),
  lastFailure: z.object({ startedAt: time, message: z.string() }).optional(),
})

/** PUT and DELETE /api/v1/pins/REFERENCE (admin): what no retention rule and no collection removes. */
export const Pin = z.object({
  /** NAME:TAG or NAME@DIGEST. */
  reference: z.string(),
  /** What it named when it was pinned. */
  digest,
  pinnedAt: time,
  by: z.string(),
})
/** GET /api/v1/pins (admin). */
export const PinList = z.object({ pins: z.array(Pin) })

/** GET /api/v1/server: open to anyone with a valid token; what `doctor` looks at. */
export const ServerInfo = z.object({
  version: z.string(),
  roles: z.array(z.string()),
  publicUrl: z.url(),
  epoch: z.string(),
  serverTime: time,
  /** What the server says of its parts, as on /readyz; 'ok', or what is wrong with one. */
  checks: z.record(z.string(), z.string()).optional(),
  /** What the caller's token says. */
  caller: z.object({
    kind: z.string(),
    name: z.string(),
    scopes: z.array(z.string()),
    expiresAt: time.optional(),
  }),
})

/** Why an address is where it is. */
export const AddressPlace = z.object({
  address: z.string(),
  place: z.string(),
  /** What decided: the longest network that was given a place, else the one of the prefix length; and where that stands. */
  network: z.string(),
  from: z.string(),
  /** Whether `topology.places` names the place. */
  listed: z.boolean(),
  parents: z.array(z.object({ level: z.string(), name: z.string() })),
  /** Shorter networks around it that would have decided otherwise. */
  lost: z.array(z.object({ network: z.string(), place: z.string(), from: z.string() })),
})

/** GET /api/v1/topology?address=…&address=…: where the server takes addresses to be; for administrators. */
export const TopologyExplanation = z.object({
  addresses: z.array(AddressPlace),
  /** From the first address to each other one. Those that share no node but the root are in no level together. */
  distances: z.array(
    z.object({ from: z.string(), to: z.string(), distance: count, level: z.string().optional() }),
  ),
})

/** What is wrong with a topology that is in no server yet, or what it consists of. */
export const TopologyCheck = z.discriminatedUnion('ok', [
  z.object({ ok: z.literal(false), faults: z.array(z.string()) }),
  z.object({
    ok: z.literal(true),
    /** Nearest first. */
    levels: z.array(
      z.object({ name: z.string(), cost: z.number().optional(), capacity: z.number().optional() }),
    ),
    /** Which part of the far peers of a reply is for each distance from 1 on. */
    farShares: z.array(z.number()),
    table: z.string().optional(),
    /** Places that have networks, and those that `topology.places` lists. */
    places: z.object({ withNetworks: count, listed: count }),
    ipv4: z.object({ networks: count, nested: count, otherwise: z.string() }),
    ipv6: z.object({ networks: count, nested: count, otherwise: z.string() }),
    warnings: z.array(z.string()),
  }),
])

// ---- the agent's control API, on its unix socket ----

/** GET /v1/status. */
export const AgentStatus = z.object({
  host: z.string(),
  place: z.string().optional(),
  version: z.string(),
  server: z.string(),
  /** Whether the last report reached the server, and when. */
  lastReportAt: time.optional(),
  lastReportError: z.string().optional(),
  engine: z.string(),
  peerPort: z.int(),
  diskUsedBytes: count,
  diskQuotaBytes: count,
  references: z.array(HeldReference.extend({ followed: z.boolean(), path: z.string().optional() })),
  blobs: z.array(
    z.object({
      digest,
      infohash: infoHash.optional(),
      sizeBytes: count,
      state: z.enum(['partial', 'verified']),
      seeding: z.boolean(),
      peers: count,
      uploadedBytes: count,
      lastUsedAt: time,
      pinned: z.boolean(),
    }),
  ),
})

const bytesPerSecond = z.number().nonnegative()

/** A connection to another host, as it is now. Host and place are its own word where no token proves them. */
export const TransferPeer = z.object({
  /** IP:PORT. */
  source: z.string(),
  host: z.string().optional(),
  place: z.string().optional(),
  /** 0 same rack, 1 next level …, 255 unknown. */
  distance: z.int().min(0).max(255),
  /** Whether it dialled this host. */
  incoming: z.boolean(),
  downloadRate: bytesPerSecond,
  uploadRate: bytesPerSecond,
  /** Bytes asked of it and not here yet; bytes that it asked for and that are not sent yet. */
  requestedBytes: count,
  owedBytes: count,
  /** The share of the pieces that it has. */
  progress: z.number().min(0).max(1),
  /** Why nothing is asked of it; absent while something is. */
  waiting: z.string().optional(),
})
/** A blob that is fetched, or that is seeded to at least one peer. */
export const Transfer = z.object({
  repository: z.string(),
  digest,
  state: z.enum(['waiting', 'fetching', 'seeding']),
  bytesDone: count,
  sizeBytes: count,
  bytes: BytesBySource,
  /** Bytes a second from all sources, the server included, and to all peers. */
  downloadRate: bytesPerSecond,
  uploadRate: bytesPerSecond,
  /** Why nothing moves. */
  reason: z.string().optional(),
  /** All connections there are; `peers` lists at most a hundred, the busiest first. */
  peerCount: count,
  peers: z.array(TransferPeer),
})
/** A release that the host does not take, since nobody has signed it whose key it trusts. */
export const RefusedRelease = z.object({
  reference: z.string(),
  digest,
  /** Why, and what to do. */
  reason: z.string(),
})
/** GET /v1/transfers: what is under way on this host. Fetches come first. */
export const TransferList = z.object({
  /** All there are; `transfers` lists at most fifty. */
  transferCount: count,
  transfers: z.array(Transfer),
  /** At most fifty; absent where nothing is refused. */
  refused: z.array(RefusedRelease).optional(),
})

/** POST /v1/fetch {reference}: answers with NDJSON, one event a line, the last of them `done` or `error`. */
export const FetchRequest = z.strictObject({ reference: z.string().max(500) })
export const FetchedFile = z.object({ name: z.string(), path: z.string(), digest, sizeBytes: count })
export const FetchEvent = z.discriminatedUnion('event', [
  z.object({ event: z.literal('progress'), held: HeldReference }),
  z.object({ event: z.literal('done'), held: HeldReference, files: z.array(FetchedFile) }),
  z.object({ event: z.literal('error'), error: ApiErrorBody.shape.error }),
])

export type ApiErrorBody = z.infer<typeof ApiErrorBody>
export type EnrollRequest = z.infer<typeof EnrollRequest>
export type HostCredential = z.infer<typeof HostCredential>
export type BytesBySource = z.infer<typeof BytesBySource>
export type HeldReference = z.infer<typeof HeldReference>
export type HostReport = z.infer<typeof HostReport>
export type ReportReply = z.infer<typeof ReportReply>
export type GrantRequest = z.infer<typeof GrantRequest>
export type SwarmGrant = z.infer<typeof SwarmGrant>
export type AnnounceTokenRequest = z.infer<typeof AnnounceTokenRequest>
export type AnnounceTokenReply = z.infer<typeof AnnounceTokenReply>
export type CreateTokenRequest = z.infer<typeof CreateTokenRequest>
export type CreatedToken = z.infer<typeof CreatedToken>
export type TokenList = z.infer<typeof TokenList>
export type TokenExchangeReply = z.infer<typeof TokenExchangeReply>
export type AuditReply = z.infer<typeof AuditReply>
export type AuditLine = z.infer<typeof AuditLine>
export type KeyInfo = z.infer<typeof KeyInfo>
export type KeyList = z.infer<typeof KeyList>
export type RotateKeyRequest = z.infer<typeof RotateKeyRequest>
export type ImportKeyRequest = z.infer<typeof ImportKeyRequest>
export type RevokeTorrentRequest = z.infer<typeof RevokeTorrentRequest>
export type RevokedTorrentList = z.infer<typeof RevokedTorrentList>
export type CreateBootstrapTokenRequest = z.infer<typeof CreateBootstrapTokenRequest>
export type CreatedBootstrapToken = z.infer<typeof CreatedBootstrapToken>
export type BootstrapTokenList = z.infer<typeof BootstrapTokenList>
export type Release = z.infer<typeof Release>
export type ReleaseList = z.infer<typeof ReleaseList>
export type ReleaseStatus = z.infer<typeof ReleaseStatus>
export type HostList = z.infer<typeof HostList>
export type GcItem = z.infer<typeof GcItem>
export type GcReport = z.infer<typeof GcReport>
export type GcStatus = z.infer<typeof GcStatus>
export type Pin = z.infer<typeof Pin>
export type PinList = z.infer<typeof PinList>
export type ServerInfo = z.infer<typeof ServerInfo>
export type AddressPlace = z.infer<typeof AddressPlace>
export type TopologyExplanation = z.infer<typeof TopologyExplanation>
export type TopologyCheck = z.infer<typeof TopologyCheck>
export type AgentStatus = z.infer<typeof AgentStatus>
export type TransferPeer = z.infer<typeof TransferPeer>
export type Transfer = z.infer<typeof Transfer>
export type RefusedRelease = z.infer<typeof RefusedRelease>
export type TransferList = z.infer<typeof TransferList>
export type FetchRequest = z.infer<typeof FetchRequest>
export type FetchedFile = z.infer<typeof FetchedFile>
export type FetchEvent = z.infer<typeof FetchEvent>

import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { BytesBySource, HeldReference, ReleaseStatus, ReportReply } from '../../lib/client/api.ts'
import { HostReport } from '../../lib/client/api.ts'
import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { parseDigest } from '../../lib/protocol/digest.ts'
import type { Place } from '../../lib/protocol/place.ts'
import { formatReference, parseReference } from '../../lib/protocol/reference.ts'
import { requireCredential } from './access-control.ts'
import type { AccessControl } from './access.ts'
import type { HostRecall } from './host-recall.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'
import { validate } from './validate.ts'

export interface HeardHost {
  readonly host: string
  /** Where the server takes it to be. */
  readonly place: string
  /** Where it called from. */
  readonly address: string
  readonly atMs: number
  readonly report: HostReport
}

/** Who is out there and how far, from what hosts report; in memory, whole again one report interval after a start. */
export interface Fleet {
  hear(host: HeardHost): void
  /** Hosts that were heard since the last call, and not for a minute before. */
  takeArrived(): string[]
  forget(host: string): void
  /** Hosts heard in the last minute. */
  present(): HeardHost[]
  /** Hosts heard at `sinceMs` or later, and those that are present anyway. */
  heardSince(sinceMs: number): HeardHost[]
}

/** Tags and digests of one repository that hosts follow, hold or fetch. */
export interface Deployed {
  readonly tags: ReadonlySet<string>
  readonly digests: ReadonlySet<Digest>
}

/** A host that has been silent for this long is not part of the fleet. */
const presentMs = 60_000

export function createFleet({ hostsMax, now }: { hostsMax: number; now: () => number }): Fleet {
  const heard = new Map<string, HeardHost>()
  const arrived = new Set<string>()
  const heardSince = (sinceMs: number) => {
    const earliestMs = Math.min(sinceMs, now() - presentMs)
    return [...heard.values()].filter(({ atMs }) => atMs >= earliestMs)
  }
  return {
    hear: (host) => {
      if ((heard.get(host.host)?.atMs ?? -Infinity) < now() - presentMs) arrived.add(host.host)
      // Re-inserted, so that the first in the map is the one silent for longest.
      heard.delete(host.host)
      heard.set(host.host, host)
      const [oldest] = heard.keys()
      if (heard.size > hostsMax && oldest !== undefined) {
        heard.delete(oldest)
        arrived.delete(oldest)
      }
    },
    takeArrived: () => {
      const hosts = [...arrived]
      arrived.clear()
      return hosts
    },
    forget: (host) => {
      heard.delete(host)
    },
    present: () => heardSince(now()),
    heardSince,
  }
}

/** What is out there, by repository. */
export function deployedOn(hosts: readonly HeardHost[]): Map<string, Deployed> {
  const deployed = new Map<string, { tags: Set<string>; digests: Set<Digest> }>()
  const of = (repository: string) => {
    const known = deployed.get(repository) ?? { tags: new Set<string>(), digests: new Set<Digest>() }
    deployed.set(repository, known)
    return known
  }
  // Ten thousand hosts say much the same.
  const followed = new Set(hosts.flatMap(({ report }) => report.follow))
  const held = new Map<string, Set<string>>()
  for (const { report } of hosts)
    for (const { reference, digest } of report.held)
      held.set(reference, (held.get(reference) ?? new Set<string>()).add(digest))
  for (const text of followed) {
    const { repository, tag, digest } = parseReference(text)
    if (tag !== undefined) of(repository).tags.add(tag)
    if (digest !== undefined) of(repository).digests.add(digest)
  }
  for (const [text, digests] of held)
    for (const digest of digests) of(parseReference(text).repository).digests.add(parseDigest(digest))
  return deployed
}

/** Digests of tags for 10,000 hosts that ask every ten seconds: read once, dropped when the tag moves. */
export interface TagCache {
  digestOf(repository: string, tag: string): Promise<Digest | undefined>
  moved(repository: string, tag: string): void
}

const tagsCached = 10_000
/** Another server may move a tag in a shared directory; it is seen after this. */
const tagFreshMs = 1000

export function createTagCache({ store, now }: { store: BlobStore; now: () => number }): TagCache {
  const cache = new Map<string, { digest: Promise<Digest | undefined>; untilMs: number }>()
  return {
    digestOf: async (repository, tag) => {
      const key = `${repository}:${tag}`
      const known = cache.get(key)
      if (known && known.untilMs > now()) return known.digest
      const digest = store.getTag(repository, tag).then((found) => found?.digest)
      if (cache.size >= tagsCached) cache.clear()
      cache.set(key, { digest, untilMs: now() + tagFreshMs })
      digest.catch(() => cache.delete(key))
      return digest
    },
    moved: (repository, tag) => {
      cache.delete(`${repository}:${tag}`)
    },
  }
}

export interface FleetDeps {
  readonly fleet: Fleet
  /** What all servers know of it together. */
  readonly view: FleetMembers
  readonly tags: TagCache
  readonly recall: HostRecall
  readonly access: AccessControl
  readonly epoch: () => string
  /** Version of the list of torrents that were revoked. */
  readonly revokedTorrents: { readonly version: string }
  readonly reportIntervalMs: number
  readonly sourceOf: (request: FastifyRequest) => Ip
  /** The host's place: the operator's word, else the address table's. */
  readonly placeOf: (place: Place | undefined, source: Ip) => string
  readonly now: () => number
}

/** Reports of hosts, and what they add up to. */
export function registerFleetRoutes(app: FastifyInstance, deps: FleetDeps): void {
  const { fleet, tags, access, now } = deps
  app.post('/api/v1/hosts/self/report', async (request): Promise<ReportReply> => {
    const caller = await access.callerOf(request.headers)
    if (caller.kind !== 'host') throw new ApiError(403, 'DENIED', 'Only a host reports')
    const report = validate(HostReport, request.body)
    const source = deps.sourceOf(request)
    const place = deps.placeOf(caller.place as Place | undefined, source)
    fleet.hear({ host: caller.name, place, address: formatIp(source), atMs: now(), report })
    deps.recall.heard(caller, formatIp(source))
    const digests = await Promise.all(
      report.follow.map(async (text) => {
        const { repository, tag, digest } = parseReference(text)
        if (!caller.may('pull', repository)) return [text, null] as const
        return [
          text,
          digest ?? (tag === undefined ? null : ((await tags.digestOf(repository, tag)) ?? null)),
        ] as const
      }),
    )
    return {
      epoch: deps.epoch(),
      tags: Object.fromEntries(digests),
      place,
      reportIntervalSeconds: deps.reportIntervalMs / 1000,
      revokedTorrents: deps.revokedTorrents.version,
      serverTime: new Date(now()).toISOString(),
    }
  })

  app.get<{ Querystring: { reference?: string | string[] } }>(
    '/api/v1/releases/status',
    async (request): Promise<ReleaseStatus> => {
      const caller = await requireCredential(access, request)
      const {
        repository,
        tag,
        digest: named,
      } = parseReference([request.query.reference ?? ''].flat().join(' '))
      if (!caller.may('pull', repository))
        throw new ApiError(403, 'DENIED', `${caller.name} may not pull ${repository}`)
      const digest = named ?? (tag === undefined ? undefined : await tags.digestOf(repository, tag))
      const reference = formatReference({ repository, tag, digest: named })
      if (digest === undefined)
        throw new ApiError(404, 'NOT_FOUND', `There is no release ${reference}`, {
          hint: '`deployctl list` shows what there is.',
        })
      const { members, unheard } = await deps.view.members(repository, digest)
      return { ...statusOf(reference, digest, members, now()), ...(unheard.length > 0 && { unheard }) }
    },
  )
}

/** Hosts of a release, as far as servers that work as one say; `unheard` names those that did not. */
export interface FleetMembers {
  /** Hosts that hold or fetch the digest, or follow a tag that points at it. */
  members(repository: string, digest: Digest): Promise<{ members: FleetMember[]; unheard: string[] }>
}

/** A host and how it stands with a release. */
export interface FleetMember {
  readonly heard: Pick<HeardHost, 'host' | 'place' | 'address' | 'atMs'>
  readonly held: HeldReference
}

/** Hosts that hold or fetch the digest, or follow a tag that points at it, each with its state. */
export async function followersOf(
  repository: string,
  digest: Digest,
  { fleet, tags }: { fleet: Fleet; tags: TagCache },
): Promise<FleetMember[]> {
  const pointing = new Map<string, boolean>()
  const pointsAt = async (text: string): Promise<boolean> => {
    const known = pointing.get(text)
    if (known !== undefined) return known
    const parsed = parseReference(text)
    const points =
      parsed.repository === repository &&
      (parsed.digest ??
        (parsed.tag === undefined ? undefined : await tags.digestOf(repository, parsed.tag))) === digest
    pointing.set(text, points)
    return points
  }
  const members: FleetMember[] = []
  for (const heard of fleet.present()) {
    const states = heard.report.held.filter(
      (held) => held.digest === digest && parseReference(held.reference).repository === repository,
    )
    // A host may have it under two tags; what counts is that it has it.
    const held = states.find(({ state }) => state === 'held') ?? states[0]
    if (held) {
      members.push({ heard, held })
      continue
    }
    for (const text of heard.report.follow) {
      if (!(await pointsAt(text))) continue
      members.push({
        heard,
        held: {
          reference: text,
          digest,
          state: 'waiting',
          bytesDone: 0,
          bytesTotal: 0,
          bytes: noBytes,
          tookMs: 0,
          reason: 'the host has not seen it yet',
        },
      })
      break
    }
  }
  return members
}

const noBytes: BytesBySource = { ownRack: 0, otherRacks: 0, webseed: 0 }

function statusOf(
  reference: string,
  digest: Digest,
  members: readonly FleetMember[],
  nowMs: number,
): ReleaseStatus {
  const places = Map.groupBy(members, ({ heard }) => heard.place)
  return {
    reference,
    digest,
    fleet: count(members),
    racks: [...places]
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([place, inPlace]) => ({
        place,
        ...count(inPlace),
        bytes: inPlace.reduce((sum, { held }) => add(sum, held.bytes), noBytes),
      })),
    hosts: members
      .map(({ heard, held }) => ({
        host: heard.host,
        place: heard.place,
        seenAt: new Date(Math.min(heard.atMs, nowMs)).toISOString(),
        held,
      }))
      .sort((a, b) => (a.place === b.place ? (a.host < b.host ? -1 : 1) : a.place < b.place ? -1 : 1)),
  }
}

function count(members: readonly { held: HeldReference }[]) {
  const total = { total: members.length, held: 0, fetching: 0, failed: 0, waiting: 0 }
  for (const { held } of members) total[held.state]++
  return total
}

function add(a: BytesBySource, b: BytesBySource): BytesBySource {
  return {
    ownRack: a.ownRack + b.ownRack,
    otherRacks: a.otherRacks + b.otherRacks,
    webseed: a.webseed + b.webseed,
  }
}

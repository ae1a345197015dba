import type { Digest } from '../../../lib/protocol/digest.ts'
import { ApiError } from '../api-error.ts'
import type { Deployed, Fleet, FleetMember, FleetMembers, TagCache } from '../fleet.ts'
import { deployedOn, followersOf } from '../fleet.ts'
import type { Gathering } from './gathering.ts'

/** The fleet as all servers know it together; each of them has heard of some hosts only. */
export interface FleetView extends FleetMembers {
  /** When each host was heard last, where it was then, and what it runs. */
  seen(): Promise<ReadonlyMap<string, SeenHost>>
  /** @throws ApiError 503 `NOT_READY` where a server does not say what it has heard, or has not heard for long enough */
  deployed(sinceMs: number): Promise<Map<string, Deployed>>
  /** No server knows the hosts any more. */
  forget(hosts: readonly string[]): void
}

export interface SeenHost {
  readonly atMs: number
  readonly place: string
  readonly agentVersion: string
}

/** Clocks of servers differ, so they tell each other how long ago something was. */
type Aged<Value extends { readonly atMs: number }> = Omit<Value, 'atMs'> & { readonly ageMs: number }

interface DeployedAnswer {
  readonly readyInMs: number
  readonly repositories: readonly (readonly [
    string,
    { tags: readonly string[]; digests: readonly Digest[] },
  ])[]
}

/** Hosts named in one message. */
const hostsToldMax = 5000
const tellMs = 1000

/**
 * Asks the servers when somebody wants to know, so that reports, of which there are ten thousand a second in the largest fleets, cost
 * nothing but the memory of the server that hears them. A host that comes to another server is forgotten by the one that it reported to before.
 */
export function startFleetView({
  fleet,
  tags,
  gathering,
  readyInMs,
  now,
}: {
  fleet: Fleet
  tags: TagCache
  gathering: Gathering
  /** How long until hosts have had the time to tell this server what they hold. */
  readyInMs: () => number
  now: () => number
}): FleetView & AsyncDisposable {
  const aged = <Value extends { readonly atMs: number }>({ atMs, ...value }: Value) => ({
    ...value,
    ageMs: now() - atMs,
  })
  const dated = <Value extends { readonly atMs: number }>({ ageMs, ...value }: Aged<Value>) =>
    ({ ...value, atMs: now() - ageMs }) as unknown as Value

  gathering.answer('fleet/members', async (question) => {
    const { repository, digest } = question as { repository: string; digest: Digest }
    const members = await followersOf(repository, digest, { fleet, tags })
    return members.map(({ heard: { host, place, address, atMs }, held }) => ({
      heard: aged({ host, place, address, atMs }),
      held,
    }))
  })
  gathering.answer('fleet/seen', () =>
    fleet
      .heardSince(0)
      .map(({ host, place, atMs, report: { agentVersion } }) => [host, aged({ place, agentVersion, atMs })]),
  )
  gathering.answer('fleet/deployed', (question): DeployedAnswer => {
    const { ageMs } = question as { ageMs: number }
    return {
      readyInMs: readyInMs(),
      repositories: [...deployedOn(fleet.heardSince(now() - ageMs))].map(([repository, deployed]) => [
        repository,
        { tags: [...deployed.tags], digests: [...deployed.digests] },
      ]),
    }
  })

  const forgetHere = (hosts: unknown) => {
    for (const host of hosts as string[]) fleet.forget(host)
  }
  gathering.hear('fleet/forget', forgetHere)
  const telling = setInterval(() => {
    const hosts = fleet.takeArrived()
    for (let at = 0; at < hosts.length; at += hostsToldMax)
      gathering.tell('fleet/forget', hosts.slice(at, at + hostsToldMax))
  }, tellMs)
  telling.unref()

  return {
    members: async (repository, digest) => {
      const { answers, missing } = await gathering.ask('fleet/members', { repository, digest })
      const latest = new Map<string, FleetMember>()
      for (const answer of answers as { heard: Aged<FleetMember['heard']>; held: FleetMember['held'] }[][])
        for (const { heard, held } of answer) {
          const member: FleetMember = { heard: dated(heard), held }
          if ((latest.get(heard.host)?.heard.atMs ?? -Infinity) < member.heard.atMs)
            latest.set(heard.host, member)
        }
      return { members: [...latest.values()], unheard: missing }
    },
    seen: async () => {
      const { answers } = await gathering.ask('fleet/seen', {})
      const latest = new Map<string, SeenHost>()
      for (const answer of answers as [string, Aged<SeenHost>][][])
        for (const [host, seen] of answer) {
          const its: SeenHost = dated(seen)
          if ((latest.get(host)?.atMs ?? -Infinity) < its.atMs) latest.set(host, its)
        }
      return latest
    },
    deployed: async (sinceMs) => {
      const { answers, missing } = await gathering.ask('fleet/deployed', { ageMs: now() - sinceMs })
      if (missing.length > 0)
        throw notReady(`${missing.join(', ')} did not say what is deployed`, 'Ask again in 10 seconds.', 10)
      const waitMs = Math.max(...(answers as DeployedAnswer[]).map((answer) => answer.readyInMs))
      if (waitMs > 0) {
        const seconds = Math.ceil(waitMs / 1000)
        throw notReady('hosts are still saying what they hold', `Ask again in ${seconds} seconds.`, seconds)
      }
      const deployed = new Map<string, { tags: Set<string>; digests: Set<Digest> }>()
      for (const { repositories } of answers as DeployedAnswer[])
        for (const [repository, its] of repositories) {
          const all = deployed.get(repository) ?? { tags: new Set(), digests: new Set() }
          for (const tag of its.tags) all.tags.add(tag)
          for (const digest of its.digests) all.digests.add(digest)
          deployed.set(repository, all)
        }
      return deployed
    },
    forget: (hosts) => {
      forgetHere(hosts)
      gathering.tell('fleet/forget', hosts)
    },
    [Symbol.asyncDispose]: async () => {
      clearInterval(telling)
      await Promise.resolve()
    },
  }
}

function notReady(why: string, hint: string, seconds: number): ApiError {
  return new ApiError(503, 'NOT_READY', `Cannot collect yet: ${why}`, {
    hint,
    headers: { 'retry-after': String(seconds) },
  })
}

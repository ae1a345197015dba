import type { Digest } from '../../../lib/protocol/digest.ts'
import { parseDigest } from '../../../lib/protocol/digest.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { isRepository, isTag } from '../../../lib/protocol/reference.ts'

/** A manifest that was pushed to another registry. */
export interface PushEvent {
  /** As its sender names it; empty where it does not. */
  readonly id: string
  readonly repository: string
  readonly digest: Digest
  readonly tag: string | undefined
}

/** What an envelope says that is of use here, and what is not, with the reason. */
export interface PushEvents {
  readonly events: readonly PushEvent[]
  readonly ignored: readonly { readonly index: number; readonly reason: string }[]
}

export const eventsMax = 1000
const idLengthMax = 256
const manifestTypes: ReadonlySet<unknown> = new Set([
  'application/vnd.oci.image.manifest.v1+json',
  'application/vnd.oci.image.index.v1+json',
  'application/vnd.docker.distribution.manifest.v2+json',
  'application/vnd.docker.distribution.manifest.list.v2+json',
])

/**
 * Reads an envelope of notifications: distribution's, version 1 and 2 (docs/content/about/notifications.md), and that of Harbor's Kraken
 * driver, which is the same with capitalised keys. Keys count in any case, as they do for Go. `target.url` is not read: what is pulled
 * comes from the upstreams of the configuration.
 *
 * One event that is of no use does not refuse the others: a registry sends an envelope again and again until it is taken.
 *
 * @param hasUpstream whether a repository can be pulled from somewhere
 * @throws ClientError `BAD_REQUEST` where it is no envelope
 */
export function readPushEvents(body: unknown, hasUpstream: (repository: string) => boolean): PushEvents {
  const list = memberOf(body, 'events')
  if (!Array.isArray(list))
    throw new ClientError('BAD_REQUEST', 'Cannot read notifications: need an object with an array `events`')
  if (list.length > eventsMax)
    throw new ClientError(
      'BAD_REQUEST',
      `Cannot read notifications: ${list.length} events in one envelope, at most ${eventsMax}`,
    )
  const events: PushEvent[] = []
  const ignored: { index: number; reason: string }[] = []
  for (const [index, event] of (list as unknown[]).entries()) {
    const read = readEvent(event)
    if (typeof read === 'string') ignored.push({ index, reason: read })
    else if (!hasUpstream(read.repository))
      ignored.push({ index, reason: `no upstream of registry.upstreams has ${read.repository}` })
    else events.push(read)
  }
  return { events, ignored }
}

/** @returns the event, or why it is of no use */
function readEvent(event: unknown): PushEvent | string {
  const action = memberOf(event, 'action')
  if (action !== 'push') return `its action is ${show(action)}, not push`
  const target = memberOf(event, 'target')
  const mediaType = memberOf(target, 'mediatype')
  if (!manifestTypes.has(mediaType)) return `its media type is ${show(mediaType)}, no manifest`
  const repository = memberOf(target, 'repository')
  if (typeof repository !== 'string' || !isRepository(repository))
    return `its repository is ${show(repository)}`
  const digest = readDigest(memberOf(target, 'digest'))
  if (digest === undefined) return 'its digest is not sha256: and 64 lower-case hex digits'
  const tag = memberOf(target, 'tag') ?? ''
  if (typeof tag !== 'string' || (tag !== '' && !isTag(tag))) return `its tag is ${show(tag)}`
  const id = memberOf(event, 'id')
  return {
    id: typeof id === 'string' ? id.slice(0, idLengthMax) : '',
    repository,
    digest,
    tag: tag === '' ? undefined : tag,
  }
}

/** A member by its name in lower case: the exact name first, else the first that is the same but for case. */
function memberOf(value: unknown, name: string): unknown {
  if (typeof value !== 'object' || value === null) return undefined
  const key = Object.keys(value).find((each) => each === name || each.toLowerCase() === name)
  return key === undefined ? undefined : (value as Record<string, unknown>)[key]
}

function readDigest(value: unknown): Digest | undefined {
  try {
    return typeof value === 'string' ? parseDigest(value) : undefined
  } catch (error) {
    if (error instanceof ClientError) return undefined
    throw error
  }
}

/** Whatever came, short, for a person. */
function show(value: unknown): string {
  return value === undefined ? 'missing' : JSON.stringify(value).slice(0, 100)
}

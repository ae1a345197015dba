import { ClientError } from './errors.ts'
import type { Digest } from './digest.ts'
import { parseDigest } from './digest.ts'

/** NAME[:TAG][@DIGEST], as people type it. The tag defaults to `latest` unless a digest is given. */
export interface Reference {
  readonly repository: string
  readonly tag: string | undefined
  readonly digest: Digest | undefined
}

const part = '[a-z0-9]+((\\.|_|__|-+)[a-z0-9]+)*'
const name = `${part}(\\/${part})*`
const whole = new RegExp(`^${name}$`)
/** What scopes, rules and upstreams are for, as a part of an expression: a repository, all below a prefix (`team/*`), or all (`*`). */
export const repositoryPatternSource = `(\\*|${name}(\\/\\*)?)`

/** OCI distribution-spec `<name>`, at most 255 characters, so that a path below it fits every file system. */
export function isRepository(text: string): boolean {
  return text.length <= 255 && whole.test(text)
}

/** Whether a pattern (`web`, `team/*`, `*`) covers a repository. */
export function covers(pattern: string, repository: string): boolean {
  if (pattern === '*') return true
  return pattern.endsWith('/*') ? repository.startsWith(pattern.slice(0, -1)) : pattern === repository
}

/** OCI distribution-spec `<reference>` as a tag. */
export function isTag(text: string): boolean {
  return /^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$/.test(text)
}

/** @throws ClientError `NAME_INVALID` or `DIGEST_INVALID`, naming the part that is wrong */
export function parseReference(text: string): Reference {
  const [named = '', ...digests] = text.split('@')
  if (digests.length > 1)
    throw new ClientError('NAME_INVALID', `Cannot read reference ${JSON.stringify(text)}: two digests`)
  const colon = named.lastIndexOf(':')
  const repository = colon < 0 ? named : named.slice(0, colon)
  const tag = colon < 0 ? undefined : named.slice(colon + 1)
  if (!isRepository(repository)) {
    throw new ClientError(
      'NAME_INVALID',
      `Cannot read name ${JSON.stringify(repository)}: need lower-case letters, digits and single . _ - inside parts separated by /`,
    )
  }
  if (tag !== undefined && !isTag(tag)) {
    throw new ClientError(
      'NAME_INVALID',
      `Cannot read tag ${JSON.stringify(tag)}: need up to 128 of A-Z a-z 0-9 _ . -`,
    )
  }
  const digest = digests[0] === undefined ? undefined : parseDigest(digests[0])
  return { repository, tag: tag ?? (digest === undefined ? 'latest' : undefined), digest }
}

/** Whether `parseReference` reads it. */
export function isReference(text: string): boolean {
  try {
    parseReference(text)
    return true
  } catch (error) {
    if (error instanceof ClientError) return false
    throw error
  }
}

/** The canonical text of a reference; `parseReference` reads it back. */
export function formatReference({ repository, tag, digest }: Reference): string {
  return `${repository}${tag === undefined ? '' : `:${tag}`}${digest === undefined ? '' : `@${digest}`}`
}

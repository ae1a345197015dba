import type { Digest } from '../../lib/protocol/digest.ts'
import { digestFromHex } from '../../lib/protocol/digest.ts'
import { covers } from '../../lib/protocol/reference.ts'
import type { Tag } from './blob-store.ts'

/** Which tags stay. The first rule that covers a tag decides about it; one that no rule covers stays. */
export interface RetentionRule {
  /** As in scopes: `web`, `team/*`, `*`. */
  readonly repositories: readonly string[]
  /** The tags that it is about, `*` for any run of characters; undefined: all. */
  readonly tags: string | undefined
  /** The newest so many stay. */
  readonly keepLast: number | undefined
  /** Tags that were moved less than this ago stay. */
  readonly keepNewerThanMs: number | undefined
  /** What a host follows, holds or fetches stays. */
  readonly keepDeployed: boolean
}

/** What is known of a repository besides its tags. */
export interface RepositoryUse {
  /** Tags that are pinned, and tags and digests that hosts say they follow, hold or fetch. */
  readonly pinnedTags: ReadonlySet<string>
  readonly deployedTags: ReadonlySet<string>
  readonly deployedDigests: ReadonlySet<string>
  /** Whether the repository has this manifest. */
  readonly has: (digest: Digest) => boolean
}

export interface TagToGo {
  readonly tag: Tag
  /** For a person. */
  readonly reason: string
}

/**
 * The tags of a repository that may go. `latest` and pinned tags stay whatever a rule says. So does the tag that names a manifest's
 * signatures for clients without the referrers API (`sha256-<hex>`, `sha256-<hex>.sig`), as long as that manifest is there.
 */
export function tagsToGo(
  rules: readonly RetentionRule[],
  {
    repository,
    tags,
    use,
    nowMs,
  }: { repository: string; tags: readonly Tag[]; use: RepositoryUse; nowMs: number },
): TagToGo[] {
  const ours = rules.filter(({ repositories }) => repositories.some((pattern) => covers(pattern, repository)))
  if (ours.length === 0) return []
  const newestFirst = tags
    .filter(({ tag }) => tag !== 'latest')
    .sort((a, b) => b.updatedAt.getTime() - a.updatedAt.getTime() || (a.tag < b.tag ? 1 : -1))
  const counted = new Map<RetentionRule, number>()
  const going: TagToGo[] = []
  for (const tag of newestFirst) {
    const rule = ours.find(
      (candidate) => candidate.tags === undefined || globMatches(candidate.tags, tag.tag),
    )
    if (!rule) continue
    const about = subjectOfTag(tag.tag)
    if (about !== undefined) {
      if (!use.has(about) && !use.pinnedTags.has(tag.tag))
        going.push({ tag, reason: 'what it is about is gone' })
      continue
    }
    const number = (counted.get(rule) ?? 0) + 1
    counted.set(rule, number)
    if (rule.keepLast !== undefined && number <= rule.keepLast) continue
    if (rule.keepNewerThanMs !== undefined && nowMs - tag.updatedAt.getTime() < rule.keepNewerThanMs) continue
    if (use.pinnedTags.has(tag.tag)) continue
    if (rule.keepDeployed && (use.deployedTags.has(tag.tag) || use.deployedDigests.has(tag.digest))) continue
    going.push({ tag, reason: reasonOf(rule) })
  }
  return going
}

function reasonOf({ keepLast, keepNewerThanMs, keepDeployed }: RetentionRule): string {
  return [
    ...(keepLast === undefined ? [] : [`not among the last ${keepLast}`]),
    ...(keepNewerThanMs === undefined ? [] : ['old']),
    ...(keepDeployed ? ['on no host'] : []),
  ].join(', ')
}

function subjectOfTag(tag: string): Digest | undefined {
  const match = /^sha256-([0-9a-f]{64})(\.|$)/.exec(tag)
  return match?.[1] === undefined ? undefined : digestFromHex(match[1])
}

/** Whether all of `text` is what `pattern` says, where `*` is any run of characters. Linear, whatever the pattern. */
export function globMatches(pattern: string, text: string): boolean {
  const [first = '', ...rest] = pattern.split('*')
  const last = rest.pop()
  if (last === undefined) return pattern === text
  if (!text.startsWith(first)) return false
  let at = first.length
  for (const part of rest) {
    const found = text.indexOf(part, at)
    if (found < 0) return false
    at = found + part.length
  }
  return text.length - last.length >= at && text.endsWith(last)
}

import type { Digest } from './digest.ts'
import { digestHex } from './digest.ts'
import { ClientError } from './errors.ts'
import type { InfoHash } from './infohash.ts'
import { infoHashToHex } from './infohash.ts'

/** Something that a statement is about. The digests are by algorithm, in lower-case hex. */
export interface Subject {
  readonly name?: string
  readonly digest: Readonly<Record<string, string>>
}

/** An in-toto Statement, version 1 (in-toto/attestation, spec/v1/statement.md). */
export interface Statement {
  readonly subject: readonly Subject[]
  readonly predicateType: string
  readonly predicate: Readonly<Record<string, unknown>>
}

/** What a release is called, and what it is. Without a tag it is meant by its digest alone. */
export interface ReleaseIdentity {
  readonly repository: string
  readonly tag: string | undefined
  readonly digest: Digest
}

/** Where a release comes from: SLSA's words, for a predicate. */
export interface Provenance {
  readonly buildType: string
  readonly builderId: string
  readonly invocationId?: string
  readonly internalParameters?: Readonly<Record<string, string>>
  readonly resolvedDependencies?: readonly { uri: string; digest?: Readonly<Record<string, string>> }[]
}

/** The type of a statement in an envelope. */
export const statementType = 'application/vnd.in-toto+json'
/** SLSA provenance, version 1 (slsa.dev/spec/v1.0/provenance). */
export const provenanceType = 'https://slsa.dev/provenance/v1'

const typeV1 = 'https://in-toto.io/Statement/v1'

/**
 * What a signature of a release says: this manifest is these tags of this repository, consists of these files, and comes from there.
 *
 * A file has two digests: the SHA-256 of its bytes, and as `btih` the infohash of its torrent (the name that it has in magnet links, BEP 9),
 * 40 lower-case hex digits.
 */
export function releaseStatement({
  repository,
  tags,
  digest,
  files,
  provenance,
}: {
  repository: string
  tags: readonly string[]
  digest: Digest
  files: readonly { name: string; digest: Digest; infoHash: InfoHash | undefined }[]
  provenance: Provenance
}): Statement {
  const { buildType, builderId, invocationId, internalParameters, resolvedDependencies } = provenance
  return {
    subject: [
      { name: repository, digest: { sha256: digestHex(digest) } },
      ...files.map(({ name, digest: its, infoHash }) => ({
        name,
        digest: {
          sha256: digestHex(its),
          ...(infoHash === undefined ? {} : { btih: infoHashToHex(infoHash) }),
        },
      })),
    ],
    predicateType: provenanceType,
    predicate: {
      buildDefinition: {
        buildType,
        externalParameters: { repository, tags },
        ...(internalParameters && { internalParameters }),
        ...(resolvedDependencies && { resolvedDependencies }),
      },
      runDetails: {
        builder: { id: builderId },
        ...(invocationId === undefined ? {} : { metadata: { invocationId } }),
      },
    },
  }
}

/**
 * Checks that a statement is about a release and no other. `anyTag` has it count for every tag of the repository.
 *
 * @throws ClientError `other_release` or `other_tag`, saying what it is about
 */
export function checkRelease(
  statement: Statement,
  { repository, tag, digest }: ReleaseIdentity,
  { anyTag = false }: { anyTag?: boolean } = {},
): void {
  // A key may sign scans and test results too, which approve of nothing.
  if (statement.predicateType !== provenanceType)
    throw new ClientError(
      'other_release',
      `what is signed is ${shown(statement.predicateType)}, not ${provenanceType}`,
    )
  const hex = digestHex(digest)
  const isIt = ({ name, digest: its }: Subject) =>
    name === repository && Object.hasOwn(its, 'sha256') && its['sha256'] === hex
  if (!statement.subject.some(isIt)) {
    const [first] = statement.subject
    throw new ClientError(
      'other_release',
      `its signature is for ${shown(first?.name)}, sha256:${shown(first?.digest['sha256'])}`,
    )
  }
  if (tag === undefined || anyTag) return
  const tags = tagsOf(statement)
  if (!tags.includes(tag))
    throw new ClientError(
      'other_tag',
      tags.length === 0
        ? 'its signature names no tag'
        : `its signature is for the tag ${tags.map(shown).slice(0, 5).join(', ')}`,
    )
}

/** The tags that a statement is about. */
export function tagsOf({ predicate }: Pick<Statement, 'predicate'>): string[] {
  const tags = member(member(predicate, 'buildDefinition'), 'externalParameters')?.['tags']
  return Array.isArray(tags) ? tags.filter((tag) => typeof tag === 'string') : []
}

/** Where a statement says that its subjects come from; what it does not say is absent. */
export function provenanceOf({ predicate }: Pick<Statement, 'predicate'>): {
  builderId: string | undefined
  invocationId: string | undefined
  source: string | undefined
  commit: string | undefined
} {
  const run = member(predicate, 'runDetails')
  const dependencies = member(predicate, 'buildDefinition')?.['resolvedDependencies']
  const source = member({ first: Array.isArray(dependencies) ? dependencies[0] : undefined }, 'first')
  return {
    builderId: textOf(member(run, 'builder')?.['id']),
    invocationId: textOf(member(run, 'metadata')?.['invocationId']),
    source: textOf(source?.['uri']),
    commit: textOf(member(source, 'digest')?.['gitCommit']),
  }
}

export function writeStatement({ subject, predicateType, predicate }: Statement): Buffer {
  return Buffer.from(JSON.stringify({ _type: typeV1, subject, predicateType, predicate }))
}

/**
 * Reads a statement. Members that are not known are passed over, as the specification wants.
 *
 * @throws ClientError `bad_statement` naming the member that is wrong
 */
export function parseStatement(bytes: Uint8Array): Statement {
  let json: unknown
  try {
    json = JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString())
  } catch {
    return wrong('payload', 'it is not JSON')
  }
  if (!isObject(json)) return wrong('payload', 'need an object')
  const { _type, subject, predicateType, predicate = {} } = json
  if (_type !== typeV1) return wrong('_type', `need ${typeV1}`)
  if (!Array.isArray(subject) || subject.length === 0) return wrong('subject', 'need a list')
  if (typeof predicateType !== 'string') return wrong('predicateType', 'need text')
  if (!isObject(predicate)) return wrong('predicate', 'need an object')
  return {
    subject: subject.map((one: unknown, i): Subject => {
      const path = `subject.${i}`
      if (!isObject(one)) return wrong(path, 'need an object')
      const { name, digest } = one
      if (name !== undefined && typeof name !== 'string') return wrong(`${path}.name`, 'need text')
      if (!isObject(digest)) return wrong(`${path}.digest`, 'need an object')
      const digests = Object.entries(digest).map(([algorithm, value]): [string, string] =>
        typeof value === 'string' ? [algorithm, value] : wrong(`${path}.digest`, 'need text'),
      )
      return { ...(name === undefined ? {} : { name }), digest: Object.fromEntries(digests) }
    }),
    predicateType,
    predicate,
  }
}

function member(
  parent: Readonly<Record<string, unknown>> | undefined,
  name: string,
): Record<string, unknown> | undefined {
  const value = parent?.[name]
  return isObject(value) ? value : undefined
}

function textOf(value: unknown): string | undefined {
  return typeof value === 'string' ? value : undefined
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** A word of somebody else, for a message. */
function shown(text: string | undefined): string {
  return text === undefined ? 'something without a name' : JSON.stringify(text.slice(0, 80)).slice(1, -1)
}

function wrong(path: string, what: string): never {
  throw new ClientError('bad_statement', `Cannot read statement: ${path}: ${what}`)
}

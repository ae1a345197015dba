import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before } from 'node:test'
import type { FleetServer } from '../../../support/fleet.ts'
import { startFleetServer } from '../../../support/fleet.ts'

export const imageManifest = 'application/vnd.oci.image.manifest.v1+json'
export const imageIndex = 'application/vnd.oci.image.index.v1+json'
export const octets = 'application/octet-stream'
export const emptyJson = Buffer.from('{}')
export const emptyType = 'application/vnd.oci.empty.v1+json'

export interface Answer {
  readonly status: number
  readonly headers: Headers
  readonly body: Buffer
  json(): unknown
}

export interface CallOptions {
  readonly body?: Uint8Array | string | undefined
  readonly headers?: Readonly<Record<string, string>>
  /** Default: an administrator's token. Undefined sends no credential. */
  readonly authorization?: string | undefined
}

export interface Registry {
  readonly server: FleetServer
  readonly admin: string
  readonly call: (method: string, path: string, options?: CallOptions) => Promise<Answer>
  /** Pushes a blob in one request. @returns its descriptor */
  readonly push: (repository: string, bytes: Buffer, mediaType?: string) => Promise<Descriptor>
  /** Puts a manifest and expects it to be taken. */
  readonly put: (
    repository: string,
    reference: string,
    content: object,
    mediaType?: string,
  ) => Promise<PutManifest>
  /** Pushes an image with one random layer. */
  readonly image: (repository: string, tag: string) => Promise<PutManifest & { layer: Descriptor }>
}

export interface PutManifest extends Descriptor {
  readonly bytes: Buffer
}

export interface Descriptor {
  readonly mediaType: string
  readonly digest: string
  readonly size: number
}

/** A server for all tests of a file, which use repositories of their own. */
export function useRegistry(settings = ''): () => Registry {
  let directory = ''
  let registry: Registry | undefined
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'rackswarm-conformance-'))
    const server = await startFleetServer(directory, { settings })
    registry = createRegistry(server, (await readFile(server.adminTokenFile, 'utf8')).trim())
  })
  after(async () => {
    await registry?.server[Symbol.asyncDispose]()
    await rm(directory, { recursive: true, force: true })
  })
  return () => registry ?? assert.fail('the server is not up')
}

function createRegistry(server: FleetServer, admin: string): Registry {
  const call = async (method: string, path: string, options: CallOptions = {}): Promise<Answer> => {
    const { body, headers } = options
    const authorization = 'authorization' in options ? options.authorization : `Bearer ${admin}`
    const response = await fetch(new URL(path, server.publicUrl), {
      method,
      headers: { ...(authorization === undefined ? {} : { authorization }), ...headers },
      ...(body === undefined ? {} : { body: typeof body === 'string' ? body : new Uint8Array(body) }),
    })
    const bytes = Buffer.from(await response.arrayBuffer())
    return {
      status: response.status,
      headers: response.headers,
      body: bytes,
      json: () => JSON.parse(bytes.toString()) as unknown,
    }
  }
  const push = async (repository: string, bytes: Buffer, mediaType = octets): Promise<Descriptor> => {
    const digest = sha256(bytes)
    const path = `/v2/${repository}/blobs/uploads/?digest=${digest}`
    const answer = await call('POST', path, { body: bytes, headers: { 'content-type': octets } })
    assert.equal(answer.status, 201, answer.body.toString())
    return { mediaType, digest, size: bytes.length }
  }
  const put: Registry['put'] = async (repository, reference, content, mediaType = imageManifest) => {
    const bytes = Buffer.from(JSON.stringify(content))
    const answer = await call('PUT', `/v2/${repository}/manifests/${reference}`, {
      body: bytes,
      headers: { 'content-type': mediaType },
    })
    assert.equal(answer.status, 201, answer.body.toString())
    return { mediaType, digest: sha256(bytes), size: bytes.length, bytes }
  }
  return {
    server,
    admin,
    call,
    push,
    put,
    image: async (repository, tag) => {
      const layer = await push(repository, randomBytes(2000), 'application/vnd.oci.image.layer.v1.tar')
      const config = await push(repository, emptyJson, 'application/vnd.oci.image.config.v1+json')
      const content = { schemaVersion: 2, mediaType: imageManifest, config, layers: [layer] }
      return { ...(await put(repository, tag, content)), layer }
    },
  }
}

export function sha256(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`
}

export function sha512(bytes: Uint8Array): string {
  return `sha512:${createHash('sha512').update(bytes).digest('hex')}`
}

/** The codes of an error body, which must have the form of the spec. */
export function codesOf(answer: Answer): string[] {
  assert.match(answer.headers.get('content-type') ?? '', /^application\/json/)
  const { errors } = answer.json() as { errors: { code: string; message?: unknown }[] }
  assert.ok(errors.length > 0)
  for (const { code, message } of errors) {
    assert.match(code, /^[A-Z_]+$/)
    assert.equal(typeof message, 'string')
  }
  return errors.map(({ code }) => code)
}

/** The status, and the codes of the error body. */
export function refusal(answer: Answer): [number, ...string[]] {
  return [answer.status, ...codesOf(answer)]
}

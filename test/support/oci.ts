import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'

export const manifestType = 'application/vnd.oci.image.manifest.v1+json'

export function sha256Of(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`
}

/** A layer of a manifest. */
export function layerOf(bytes: Uint8Array): { mediaType: string; digest: string; size: number } {
  return { mediaType: 'application/octet-stream', digest: sha256Of(bytes), size: bytes.length }
}

type Init = Omit<RequestInit, 'headers'> & { headers?: Record<string, string> }

/** The calls that a client of the OCI distribution API makes, with one token. */
export function ociClient(publicUrl: string, token: string) {
  const call = async (path: string, init: Init = {}) =>
    fetch(new URL(path, publicUrl), {
      ...init,
      headers: { authorization: `Bearer ${token}`, ...init.headers },
    })
  /** The status alone. */
  const statusOf = async (path: string, init: Init = {}) => {
    const response = await call(path, init)
    await response.arrayBuffer()
    return response.status
  }
  /** Ends an upload with all of its bytes. */
  const finish = async (location: string | null, bytes: Uint8Array<ArrayBuffer>) => {
    const url = new URL(location ?? '', publicUrl)
    url.searchParams.set('digest', sha256Of(bytes))
    const headers = { 'content-type': 'application/octet-stream' }
    const status = await statusOf(url.href, { method: 'PUT', headers, body: bytes })
    assert.equal(status, 201)
  }
  return {
    call,
    statusOf,
    headBlob: (repository: string, digest: string) =>
      statusOf(`/v2/${repository}/blobs/${digest}`, { method: 'HEAD' }),
    pushBlob: async (repository: string, bytes: Uint8Array<ArrayBuffer>): Promise<string> => {
      const started = await call(`/v2/${repository}/blobs/uploads/`, { method: 'POST' })
      await started.arrayBuffer()
      assert.equal(started.status, 202)
      await finish(started.headers.get('location'), bytes)
      return sha256Of(bytes)
    },
    /** Mounts it, or pushes it where it cannot be mounted. @returns whether it was mounted */
    mountBlob: async (repository: string, bytes: Uint8Array<ArrayBuffer>, from: string): Promise<boolean> => {
      const query = new URLSearchParams({ mount: sha256Of(bytes), from })
      const answer = await call(`/v2/${repository}/blobs/uploads/?${query.toString()}`, { method: 'POST' })
      await answer.arrayBuffer()
      if (answer.status === 201) return true
      assert.equal(answer.status, 202)
      await finish(answer.headers.get('location'), bytes)
      return false
    },
    pullBlob: async (repository: string, digest: string): Promise<Buffer | undefined> => {
      const response = await call(`/v2/${repository}/blobs/${digest}`)
      const bytes = Buffer.from(await response.arrayBuffer())
      return response.status === 200 ? bytes : undefined
    },
    /** @returns the digest, the status and the error's code */
    putManifest: async (repository: string, content: object, tag?: string) => {
      const bytes = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: manifestType, ...content }))
      const digest = sha256Of(bytes)
      const response = await call(`/v2/${repository}/manifests/${tag ?? digest}`, {
        method: 'PUT',
        headers: { 'content-type': manifestType },
        body: bytes,
      })
      const text = await response.text()
      const { errors } = (text === '' ? {} : JSON.parse(text)) as { errors?: { code: string }[] }
      return { digest, size: bytes.length, status: response.status, code: errors?.[0]?.code }
    },
    deleteManifest: (repository: string, reference: string) =>
      statusOf(`/v2/${repository}/manifests/${reference}`, { method: 'DELETE' }),
    deleteBlob: (repository: string, digest: string) =>
      statusOf(`/v2/${repository}/blobs/${digest}`, { method: 'DELETE' }),
  }
}
export type OciClient = ReturnType<typeof ociClient>

/** A release of one random layer under a tag. @returns the digests */
export async function pushRelease(
  client: OciClient,
  repository: string,
  tag: string | undefined,
  sizeBytes = 1000,
): Promise<{ manifest: string; layer: string }> {
  const bytes = new Uint8Array(randomBytes(sizeBytes))
  const layer = await client.pushBlob(repository, bytes)
  const { digest, status } = await client.putManifest(repository, { layers: [layerOf(bytes)] }, tag)
  assert.equal(status, 201)
  return { manifest: digest, layer }
}

// Debian's docker-registry (distribution 2.8), as a process.
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { digestOf } from '../../lib/protocol/digest.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import { untilListening } from './until.ts'

export interface DockerRegistry extends AsyncDisposable {
  readonly url: string
  readonly host: string
  readonly pid: number
}

/** Starts it on a port of loopback; what `directory` holds from an earlier start is there. `notify` is told of every push. */
export async function startDockerRegistry(
  directory: string,
  { port, notify }: { port: number; notify?: { url: string; token: string } },
): Promise<DockerRegistry> {
  await mkdir(directory, { recursive: true })
  const endpoint = notify && {
    name: 'rackswarm',
    url: notify.url,
    headers: { Authorization: [`Bearer ${notify.token}`] },
    timeout: '2s',
    threshold: 5,
    backoff: '1s',
  }
  const config = {
    version: '0.1',
    log: { level: 'warn', accesslog: { disabled: true } },
    storage: {
      filesystem: { rootdirectory: join(directory, 'data') },
      delete: { enabled: true },
      cache: { blobdescriptor: 'inmemory' },
    },
    http: { addr: `127.0.0.1:${port}` },
    ...(endpoint && { notifications: { endpoints: [endpoint] } }),
  }
  const file = join(directory, 'config.yml')
  // JSON is YAML too.
  await writeFile(file, JSON.stringify(config), { mode: 0o600 })
  const child = spawn('docker-registry', ['serve', file], { stdio: 'ignore' })
  const ended = new Promise((settle) => {
    child.once('exit', settle)
    child.once('error', settle)
  })
  await untilListening(port)
  const host = `127.0.0.1:${port}`
  return {
    url: `http://${host}`,
    host,
    pid: child.pid ?? 0,
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGKILL')
      await ended
    },
  }
}

export interface PushedImage {
  readonly digest: Digest
  readonly config: Digest
  readonly layer: Digest
  readonly layerBytes: Buffer
}

const imageType = 'application/vnd.oci.image.manifest.v1+json'
const indexType = 'application/vnd.oci.image.index.v1+json'

/** Pushes an image of one random layer, as a client would, to a registry that lets anyone in. Without a tag by its digest. */
export async function pushImage(
  registryUrl: string,
  repository: string,
  { tag, sizeBytes = 700_000 }: { tag?: string; sizeBytes?: number } = {},
): Promise<PushedImage> {
  const layerBytes = randomBytes(sizeBytes)
  const layer = await pushBlob(registryUrl, repository, layerBytes)
  const configBytes = Buffer.from(
    JSON.stringify({
      architecture: 'amd64',
      os: 'linux',
      config: {},
      rootfs: { type: 'layers', diff_ids: [layer] },
    }),
  )
  const config = await pushBlob(registryUrl, repository, configBytes)
  const manifest = Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: imageType,
      config: {
        mediaType: 'application/vnd.oci.image.config.v1+json',
        digest: config,
        size: configBytes.length,
      },
      layers: [{ mediaType: 'application/vnd.oci.image.layer.v1.tar', digest: layer, size: sizeBytes }],
    }),
  )
  const digest = await pushManifest(registryUrl, repository, tag, imageType, manifest)
  return { digest, config, layer, layerBytes }
}

/** Attaches an empty artifact to a manifest, and lists it under the tag that older registries know referrers by. */
export async function pushReferrer(
  registryUrl: string,
  repository: string,
  subject: Digest,
): Promise<Digest> {
  const empty = Buffer.from('{}')
  const content = {
    mediaType: 'application/vnd.oci.empty.v1+json',
    digest: await pushBlob(registryUrl, repository, empty),
    size: 2,
  }
  const bytes = Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: imageType,
      artifactType: 'application/vnd.test.signature',
      config: content,
      layers: [content],
      subject: { mediaType: imageType, digest: subject, size: 1 },
    }),
  )
  const digest = await pushManifest(registryUrl, repository, undefined, imageType, bytes)
  const manifests = [{ mediaType: imageType, digest, size: bytes.length }]
  const index = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: indexType, manifests }))
  await pushManifest(registryUrl, repository, subject.replace(':', '-'), indexType, index)
  return digest
}

/** Pushes an index of images that are there. */
export async function pushIndex(
  registryUrl: string,
  repository: string,
  tag: string,
  images: readonly PushedImage[],
): Promise<Digest> {
  const manifests = await Promise.all(
    images.map(async ({ digest }, i) => {
      const found = await fetch(`${registryUrl}/v2/${repository}/manifests/${digest}`, {
        headers: { accept: imageType },
      })
      const size = (await found.arrayBuffer()).byteLength
      return { mediaType: imageType, digest, size, platform: { os: 'linux', architecture: `cpu${i}` } }
    }),
  )
  const index = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: indexType, manifests }))
  return pushManifest(registryUrl, repository, tag, indexType, index)
}

async function pushBlob(registryUrl: string, repository: string, bytes: Buffer): Promise<Digest> {
  const digest = digestOf(bytes)
  const started = await fetch(`${registryUrl}/v2/${repository}/blobs/uploads/`, { method: 'POST' })
  const location = new URL(started.headers.get('location') ?? '', registryUrl)
  location.searchParams.set('digest', digest)
  const pushed = await fetch(location, { method: 'PUT', body: new Uint8Array(bytes) })
  if (pushed.status !== 201) throw new Error(`the blob was not pushed: ${pushed.status}`)
  return digest
}

async function pushManifest(
  registryUrl: string,
  repository: string,
  tag: string | undefined,
  mediaType: string,
  bytes: Buffer,
): Promise<Digest> {
  const digest = digestOf(bytes)
  const pushed = await fetch(`${registryUrl}/v2/${repository}/manifests/${tag ?? digest}`, {
    method: 'PUT',
    headers: { 'content-type': mediaType },
    body: new Uint8Array(bytes),
  })
  if (pushed.status !== 201) throw new Error(`the manifest was not pushed: ${pushed.status}`)
  return digest
}

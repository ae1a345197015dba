import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'

const run = promisify(execFile)

/** Copies an image with skopeo, to or from a registry of loopback. @throws Error with what skopeo wrote */
export async function skopeoCopy(authFile: string, ...args: string[]): Promise<void> {
  await run('skopeo', ['--insecure-policy', 'copy', '--preserve-digests', '--authfile', authFile, ...args])
}

/** Writes what `docker login` would, for a token. */
export async function writeAuthFile(file: string, publicUrl: string, token: string): Promise<void> {
  const auth = Buffer.from(`token:${token}`).toString('base64')
  await writeFile(file, JSON.stringify({ auths: { [new URL(publicUrl).host]: { auth } } }), { mode: 0o600 })
}

/** An OCI image layout with one random layer. @returns the layer's SHA-256 in hex */
export async function writeImage(directory: string): Promise<string> {
  const blobs = join(directory, 'blobs', 'sha256')
  await mkdir(blobs, { recursive: true })
  const put = async (mediaType: string, bytes: Buffer) => {
    const hex = createHash('sha256').update(bytes).digest('hex')
    await writeFile(join(blobs, hex), bytes)
    return { mediaType, digest: `sha256:${hex}`, size: bytes.length }
  }
  const json = (value: object) => Buffer.from(JSON.stringify(value))
  const layer = await put('application/vnd.oci.image.layer.v1.tar', randomBytes(700_000))
  const config = await put(
    'application/vnd.oci.image.config.v1+json',
    json({
      architecture: 'amd64',
      os: 'linux',
      config: {},
      rootfs: { type: 'layers', diff_ids: [layer.digest] },
    }),
  )
  const manifest = await put(
    'application/vnd.oci.image.manifest.v1+json',
    json({
      schemaVersion: 2,
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      config,
      layers: [layer],
    }),
  )
  await writeFile(join(directory, 'oci-layout'), json({ imageLayoutVersion: '1.0.0' }))
  await writeFile(
    join(directory, 'index.json'),
    json({
      schemaVersion: 2,
      manifests: [{ ...manifest, annotations: { 'org.opencontainers.image.ref.name': '1' } }],
    }),
  )
  return layer.digest.slice(7)
}

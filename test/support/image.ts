// Container images as they lie on disk (OCI image-spec, image-layout.md), with layers that a container engine can unpack.
import { createHash, randomBytes } from 'node:crypto'
import { mkdir, open, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'

export interface WrittenImage {
  /** Of each platform, in the order asked for. */
  readonly layers: readonly { readonly sha256: string; readonly sizeBytes: number }[]
  /** Everything that a pull of all platforms brings, by SHA-256. */
  readonly blobs: readonly string[]
}

/** Writes a layout whose tag `1` is an index of an image for each architecture, with one layer of random bytes. */
export async function writeIndexImage(
  directory: string,
  platforms: readonly { architecture: string; layerBytes: number }[],
): Promise<WrittenImage> {
  const folder = join(directory, 'blobs', 'sha256')
  await mkdir(folder, { recursive: true })
  const blobs: string[] = []
  const put = async (mediaType: string, value: object) => {
    const bytes = Buffer.from(JSON.stringify(value))
    const sha256 = createHash('sha256').update(bytes).digest('hex')
    await writeFile(join(folder, sha256), bytes)
    blobs.push(sha256)
    return { mediaType, digest: `sha256:${sha256}`, size: bytes.length }
  }
  const layers: { sha256: string; sizeBytes: number }[] = []
  const manifests: object[] = []
  for (const { architecture, layerBytes } of platforms) {
    const layer = await writeLayer(folder, layerBytes)
    layers.push(layer)
    blobs.push(layer.sha256)
    const digest = `sha256:${layer.sha256}`
    const config = await put('application/vnd.oci.image.config.v1+json', {
      architecture,
      os: 'linux',
      config: {},
      rootfs: { type: 'layers', diff_ids: [digest] },
    })
    const manifest = await put('application/vnd.oci.image.manifest.v1+json', {
      schemaVersion: 2,
      mediaType: 'application/vnd.oci.image.manifest.v1+json',
      config,
      layers: [{ mediaType: 'application/vnd.oci.image.layer.v1.tar', digest, size: layer.sizeBytes }],
    })
    manifests.push({ ...manifest, platform: { architecture, os: 'linux' } })
  }
  const mediaType = 'application/vnd.oci.image.index.v1+json'
  const index = await put(mediaType, { schemaVersion: 2, mediaType, manifests })
  await writeFile(join(directory, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}')
  await writeFile(
    join(directory, 'index.json'),
    JSON.stringify({
      schemaVersion: 2,
      manifests: [{ ...index, annotations: { 'org.opencontainers.image.ref.name': '1' } }],
    }),
  )
  return { layers, blobs }
}

/** A tar (POSIX ustar) with one file of random bytes. */
async function writeLayer(folder: string, fileBytes: number): Promise<{ sha256: string; sizeBytes: number }> {
  const header = Buffer.alloc(512)
  header.write('payload')
  header.write('0000644\0', 100)
  header.write('0000000\0'.repeat(2), 108)
  header.write(`${fileBytes.toString(8).padStart(11, '0')}\0`, 124)
  header.write('00000000000\0', 136)
  header.write('        0', 148)
  header.write('ustar\x0000', 257)
  header.write(
    `${header
      .reduce((sum, byte) => sum + byte, 0)
      .toString(8)
      .padStart(6, '0')}\0 `,
    148,
  )
  const hash = createHash('sha256')
  const aside = join(folder, 'layer')
  let sizeBytes = 0
  {
    await using file = await open(aside, 'w')
    const write = async (bytes: Buffer) => {
      hash.update(bytes)
      await file.writeFile(bytes)
      sizeBytes += bytes.length
    }
    await write(header)
    for (let left = fileBytes; left > 0; left -= Math.min(left, 4 * 1024 * 1024))
      await write(randomBytes(Math.min(left, 4 * 1024 * 1024)))
    await write(Buffer.alloc(((512 - (fileBytes % 512)) % 512) + 1024))
  }
  const sha256 = hash.digest('hex')
  await rename(aside, join(folder, sha256))
  return { sha256, sizeBytes }
}

import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { RequestError, createHttpClient } from '../../../lib/client/http.ts'
import { createRegistryClient } from '../../../lib/client/registry-client.ts'
import { attachedBundles } from '../../../lib/client/signatures.ts'
import { digestOf } from '../../../lib/protocol/digest.ts'
import { bundleMaxBytes, bundleType } from '../../../lib/protocol/dsse.ts'

const subject = digestOf(Buffer.from('a release'))
const keyAnnotation = 'vnd.rackswarm.signature.key'

test('signatures are listed over pages, other things passed over, those of a key that is asked for first', async (t) => {
  const registry = await startRegistry(t)
  const [one, two, three] = ['one', 'two', 'three'].map((text) => registry.attach(text, { key: text }))
  registry.list.push({ ...registry.entry('sbom'), artifactType: 'application/spdx+json' })
  registry.list.push({ ...registry.entry('sha512'), digest: `sha512:${'a'.repeat(128)}` })
  assert.deepEqual(await registry.read(['three', 'nobody']), [
    { digest: three, text: 'three' },
    { digest: one, text: 'one' },
    { digest: two, text: 'two' },
  ])
  assert.ok(registry.paths.filter((path) => path.includes('/referrers/')).length > 1, 'more than one page')
})

test('one that is damaged, too large or gone comes with what is wrong, and keeps no other from being read', async (t) => {
  const registry = await startRegistry(t)
  const gone = registry.attach('gone', {})
  registry.bytes.delete(gone)
  const noBlob = registry.attach('no blob', {})
  registry.bytes.delete(digestOf(Buffer.from('no blob')))
  const changed = registry.attach('changed', {})
  registry.bytes.set(digestOf(Buffer.from('changed')), Buffer.from('Changed'))
  registry.attach('huge', { size: bundleMaxBytes + 1 })
  registry.attachManifest({ layers: [] })
  registry.attachManifest({ layers: 'none' })
  registry.attachManifest({ layers: [{ digest: 'md5:0', size: 1 }] })
  registry.list.push({ ...registry.entry('a large manifest'), size: 1024 * 1024 })
  const good = registry.attach('good', {})
  const all = await registry.read([])
  assert.deepEqual(
    all.map(({ digest, reason, text }) => [digest, reason?.replace(/sha256:\w+/, 'DIGEST') ?? text]),
    [
      [gone, 'a signature is listed and cannot be had'],
      [noBlob, 'a signature is listed and cannot be had'],
      [changed, 'a signature is not what DIGEST names'],
      [
        registry.list[3]?.digest,
        'Cannot read signature: bundle: it has 1048577 bytes, at most 1048576 are read',
      ],
      [registry.list[4]?.digest, 'Cannot read signature: layers: need a list of 1'],
      [registry.list[5]?.digest, 'Cannot read signature: layers: need a list of 1'],
      [registry.list[6]?.digest, 'Cannot read digest "md5:0": need sha256: and 64 lower-case hex digits'],
      [
        registry.list[7]?.digest,
        'Cannot read signature: its manifest has 1048576 bytes, at most 65536 are read',
      ],
      [good, 'good'],
    ],
  )
})

test('what the registry finds good by a key comes first, once, and a list that it did not filter is not taken for that', async (t) => {
  const registry = await startRegistry(t)
  const [one, two] = ['one', 'two'].map((text) => registry.attach(text, {}))
  const both = [
    { digest: one, text: 'one' },
    { digest: two, text: 'two' },
  ]
  assert.deepEqual(await registry.read(['k']), both)
  registry.filters = 'artifactType'
  assert.deepEqual(await registry.read(['k']), both)
  registry.filters = 'artifactType,signedBy'
  registry.good.set('spki of k', two ?? '')
  registry.good.set('spki of l', two ?? '')
  assert.deepEqual(await registry.read(['k', 'l', 'm']), both.toReversed())
})

test('where the registry finds none, a hundred are looked at to say what is wrong', async (t) => {
  const registry = await startRegistry(t)
  registry.pageEntries = 100
  for (let i = 0; i < 30; i++) registry.attach(`other ${i}`, { key: 'other' })
  for (let i = 0; i < 101; i++) registry.attach(`false ${i}`, { key: 'k' })
  const all = await registry.read(['k'])
  assert.deepEqual(
    all.map(({ text }) => text),
    [...Array.from({ length: 100 }, (_, i) => `false ${i}`), undefined],
  )
  assert.equal(
    all.at(-1)?.reason,
    '131 signatures are attached to it, the server finds no good one, and only 100 are looked at',
  )
})

test('a registry without referrers has no signatures; one that fails is no registry without them', async (t) => {
  const registry = await startRegistry(t)
  registry.fails = 404
  assert.deepEqual(await registry.read([]), [])
  registry.fails = 503
  await assert.rejects(registry.read([]), (error) => error instanceof RequestError && error.status === 503)
  registry.fails = undefined
  registry.endless = true
  assert.deepEqual(await registry.read([]), [], 'a list without an end is read for some pages')
  registry.endless = false
  registry.list.push({ nothing: true } as never)
  await assert.rejects(registry.read([]), /list of referrers is no index/)
})

interface Entry {
  digest: string
  size: number
  artifactType: string
  annotations?: Record<string, string>
}

/** A registry that lists a few referrers a page, on a real socket. */
async function startRegistry(t: TestContext) {
  const bytes = new Map<string, Buffer>()
  const list: Entry[] = []
  const paths: string[] = []
  const put = (content: Buffer) => {
    bytes.set(digestOf(content), content)
    return digestOf(content)
  }
  const entry = (text: string): Entry => ({
    digest: digestOf(Buffer.from(text)),
    size: text.length,
    artifactType: bundleType,
  })
  const attachManifest = (manifest: object, key?: string) => {
    const content = Buffer.from(JSON.stringify(manifest))
    list.push({
      ...entry(content.toString()),
      ...(key === undefined ? {} : { annotations: { [keyAnnotation]: key } }),
    })
    return put(content)
  }
  const good = new Map<string, string>()
  const state: {
    pageEntries: number
    fails: number | undefined
    endless: boolean
    filters: string | undefined
  } = {
    pageEntries: 2,
    fails: undefined,
    endless: false,
    filters: undefined,
  }
  const server = createServer((request, response) => {
    const url = new URL(request.url ?? '/', 'http://registry')
    paths.push(url.pathname)
    if (state.fails !== undefined) {
      response.writeHead(state.fails).end()
    } else if (url.searchParams.has('signedBy') && state.filters !== undefined) {
      response.setHeader('oci-filters-applied', state.filters)
      const found = good.get(url.searchParams.get('signedBy') ?? '')
      response.end(JSON.stringify({ manifests: list.filter(({ digest }) => digest === found) }))
    } else if (url.pathname.includes('/referrers/')) {
      const from = Number(url.searchParams.get('from') ?? 0)
      const more = state.endless || from + state.pageEntries < list.length
      if (more) response.setHeader('link', `<${url.pathname}?from=${from + state.pageEntries}>; rel="next"`)
      const manifests = state.endless ? [] : list.slice(from, from + state.pageEntries)
      response.end(JSON.stringify({ schemaVersion: 2, manifests }))
    } else {
      const content = bytes.get(url.pathname.replace(/^.*\//, ''))
      response.writeHead(content ? 200 : 404).end(content)
    }
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  const http = createHttpClient({ baseUrl: `http://127.0.0.1:${(server.address() as AddressInfo).port}` })
  t.after(() => http[Symbol.asyncDispose]())
  return Object.assign(state, {
    bytes,
    list,
    good,
    paths,
    entry,
    attachManifest,
    attach: (text: string, { key, size }: { key?: string; size?: number }) => {
      const layer = put(Buffer.from(text))
      return attachManifest({ layers: [{ digest: layer, size: size ?? text.length }] }, key)
    },
    read: async (keyIds: string[]) => {
      const found: { digest: string; text?: string; reason?: string }[] = []
      const registry = createRegistryClient(http)
      const keys = keyIds.map((id) => ({ id, spki: `spki of ${id}` }))
      const release = { repository: 'web', tag: '1', digest: subject }
      for await (const bundle of attachedBundles(registry, { ...release, keys }))
        found.push(
          'bytes' in bundle
            ? { digest: bundle.digest, text: Buffer.from(bundle.bytes).toString() }
            : { digest: bundle.digest, reason: bundle.reason },
        )
      return found
    },
  })
}

import assert from 'node:assert/strict'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { parse } from 'yaml'
import type { z } from 'zod'
import { parseIp } from '../../lib/protocol/address.ts'
import { parseAnnounce } from '../../lib/protocol/announce.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import type { AnnounceRequest, PreHookDefinition } from '../../server/tracker/hooks.ts'
import { builtInPreHooks } from '../../server/tracker/hooks/built-in.ts'
import {
  announceQuery,
  bencoded,
  first,
  httpGet,
  startTracker,
  temporaryDirectory,
  text,
} from '../support/tracker.ts'

const guide = await readFile(join(import.meta.dirname, '..', '..', 'docs', 'hooks.md'), 'utf8')

test('each hook has the example, the refusal and the reason that docs/hooks.md says', async (t) => {
  const torrents = join(await temporaryDirectory(t), 'torrents.txt')
  await writeFile(torrents, `${'0'.repeat(40)}\n`)
  for (const definition of builtInPreHooks as readonly PreHookDefinition<z.ZodType>[]) {
    const { name } = definition
    const section = new RegExp(`^### ${name}\n[^]*?^\`\`\`yaml\n[^]*?^\`\`\`$`, 'm').exec(guide)?.[0]
    assert.ok(section, name)
    const yaml =
      /```yaml\n([^]*)```/.exec(section)?.[1]?.replace('/etc/rackswarm/torrents.txt', torrents) ?? ''
    const { prehooks } = parse(yaml) as { prehooks: { name: string; options: unknown }[] }
    const [example] = prehooks
    assert.equal(example?.name, name)
    const deps = { log: silentLog(), now: () => 0, random: () => 0.5 }
    const hook = await definition.create(definition.options.parse(example.options), deps)
    let refusal: unknown
    try {
      // Nobody of no approved network, with an unknown client and torrent, a thousand times.
      for (let i = 0; i < 1000; i++) await hook.announce?.(strangerAnnounce())
    } catch (error) {
      refusal = error
    }
    await hook[Symbol.asyncDispose]?.()
    const said = /^Refuses with `(.*?)`[^]*?reason `(\w+)`/m.exec(section)
    if (!said) {
      assert.match(section, /^Refuses nothing\.$/m)
      assert.equal(refusal, undefined)
      continue
    }
    assert.ok(refusal instanceof ClientError, name)
    assert.deepEqual([refusal.message, refusal.code], [said[1], said[2]])
    assert.equal(refusal.retryInMinutes, section.includes('`retry in` 1 minute') ? 1 : undefined)
  }
})

test('the hooks of one’s own in docs/hooks.md run in a server as they stand there', async (t) => {
  const directory = await temporaryDirectory(t)
  const modules = [...guide.matchAll(/^```js\n\/\/ \/etc\/rackswarm\/([\w.]+)[^]*?^```$/gm)]
  assert.deepEqual(
    modules.map(([, file]) => file),
    ['ports.js', 'completed.js'],
  )
  for (const [block, file = ''] of modules)
    await writeFile(join(directory, file.replace('.js', '.mjs')), block.replace(/^```\w*\n?/gm, ''))
  const tracker = await startTracker(
    t,
    `tracker: { approval: none, trusted_announcers: [127.0.0.1] }
topology: { levels: [rack, row] }
prehooks: [{ name: ./ports.mjs, options: { ports: [6881] } }]
posthooks: [{ name: ./completed.mjs }]
`,
    { directory },
  )
  const announce = async (over: Parameters<typeof announceQuery>[0], more = '') =>
    bencoded((await httpGet(first(tracker.http), `/announce?${announceQuery(over, more)}`)).body)
  assert.equal(text((await announce({ port: 1 })).get('failure reason')), 'unapproved port')
  await announce({ left: 0, event: 'completed' }, 'ip=10.0.1.1')
  const near = await announce({}, 'ip=10.0.1.2')
  assert.equal(text(near.get('peers')).length, 6)
  const far = await announce({}, 'ip=10.0.2.1')
  assert.equal(far.get('complete'), 1)
  assert.equal(text(far.get('peers')), '')
  assert.match(await tracker.metrics(), /^rackswarm_tracker_refused_total\{reason="other"\} 1$/m)
  const deadline = performance.now() + 10_000
  while (!/"complete":1,.*"msg":"completed"/.test(await tracker.log()))
    assert.ok(performance.now() < deadline, 'the post-hook was told nothing')
  assert.match(await tracker.log(), /"msg":"port approval"/)
})

function strangerAnnounce(): AnnounceRequest {
  const source = parseIp('192.0.2.1')
  if (!source) throw new Error('no address')
  return {
    frontend: 'http',
    announce: parseAnnounce(announceQuery({ peerId: Buffer.from('-XX0001-abcdefghijkl') })),
    source,
    place: undefined,
    trackerId: undefined,
    extraIntervalSeconds: 0,
    extraMinIntervalSeconds: 0,
  }
}

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { access, readFile, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { parse } from 'yaml'
import { AgentConfig } from '../../agent/config.ts'
import { loadConfig, parseConfig } from '../../lib/runtime/config.ts'
import { ServerConfig, topologyOf } from '../../server/config.ts'
import { Scenario } from '../../simulator/scenario.ts'
import { builtInPreHooks } from '../../server/tracker/hooks/built-in.ts'
import { createTopology } from '../../server/tracker/topology.ts'
import { bin } from '../support/fleet.ts'

const root = join(import.meta.dirname, '..', '..')
const examples = join(root, 'configs', 'examples')
const foreign = 'chihaya.yaml'

test('rackswarm-server --check finds every example good, and chihaya’s own to be of somebody else', async () => {
  const names = await readdir(examples)
  assert.ok(names.length >= 6)
  await Promise.all(
    names.map(async (name) => {
      const { code, output } = await check(join(examples, name))
      if (name === foreign) {
        assert.equal(code, 78, output)
        assert.match(output, /chihaya\.yaml:2:1 chihaya: there is no such setting/)
      } else {
        assert.equal(code, 0, `${name}: ${output}`)
        // What --check does not look at.
        createTopology(topologyOf(await loadConfig(ServerConfig, join(examples, name))))
      }
    }),
  )
})

test('from-chihaya.yaml and the guide name every key of chihaya', async () => {
  const { chihaya } = parse(await readFile(join(examples, foreign), 'utf8')) as { chihaya: Section }
  const translation = await readFile(join(examples, 'from-chihaya.yaml'), 'utf8')
  const guide = await readFile(join(root, 'docs', 'migrating-from-chihaya.md'), 'utf8')
  const leaves = leavesOf(chihaya)
  assert.ok(leaves.length > 35)
  for (const { section, key } of leaves) {
    const said = ['http', 'udp', 'storage'].includes(section) ? `${section}.${key}` : key
    assert.ok(translation.includes(said), `from-chihaya.yaml does not say what becomes of ${section} ${said}`)
    const inGuide = section === 'config' ? [`storage.config.${key}`, `.${key}`] : [said]
    assert.ok(
      inGuide.some((name) => guide.includes(`\`${name}\``)),
      `the guide does not say what becomes of ${section} ${said}`,
    )
  }
})

test('every configuration in the docs is one', async () => {
  const docs = join(root, 'docs')
  let blocks = 0
  for (const name of (await readdir(docs)).filter((entry) => entry.endsWith('.md'))) {
    const text = await readFile(join(docs, name), 'utf8')
    for (const [, yaml = ''] of text.matchAll(/^```yaml\n([^]*?)^```$/gm)) {
      if (/^groups:/m.test(yaml)) continue
      blocks++
      // Those of selection.md are what is simulated; that of an agent says which its server is.
      const schema = /^server: /m.test(yaml) ? AgentConfig : ServerConfig
      parseConfig(name === 'selection.md' ? Scenario : schema, yaml, `docs/${name}`)
    }
  }
  assert.ok(blocks > 6)
})

test('every link in the docs leads somewhere', async () => {
  const files = ['README.md', ...(await readdir(join(root, 'docs'))).map((name) => `docs/${name}`)]
  let links = 0
  for (const file of files.filter((name) => name.endsWith('.md'))) {
    const text = await readFile(join(root, file), 'utf8')
    for (const [, target = '', anchor] of text.matchAll(/\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)/g)) {
      links++
      const path = target === '' ? join(root, file) : join(root, file, '..', target)
      if (anchor === undefined) {
        await assert.doesNotReject(access(path), `${file}: there is no ${target}`)
      } else {
        const anchors = [...(await readFile(path, 'utf8')).matchAll(/^#+ (.*)$/gm)].map(([, title = '']) =>
          title
            .toLowerCase()
            .replaceAll(/[^\w\- ]/g, '')
            .replaceAll(' ', '-'),
        )
        assert.ok(anchors.includes(anchor), `${file}: ${target} has no #${anchor}`)
      }
    }
  }
  assert.ok(links > 20)
})

test('the schema for editors knows the options of the hooks and of the store', async () => {
  const text = await readFile(join(root, 'configs', 'server.schema.json'), 'utf8')
  const { properties } = JSON.parse(text) as {
    properties: {
      prehooks: { items: { anyOf: { properties: { name: { const?: string }; options: Section } }[] } }
      storage: { anyOf: { properties: { config: { properties?: Section } } }[] }
    }
  }
  const known = new Map(
    properties.prehooks.items.anyOf.map(({ properties: hook }) => [hook.name.const, hook.options]),
  )
  for (const { name, options } of builtInPreHooks) {
    const members = known.get(name)?.['properties']
    assert.deepEqual(Object.keys(members ?? {}), Object.keys(options.shape), name)
  }
  assert.ok(known.has(undefined), 'a hook with a path')
  assert.ok('snapshot_interval' in (properties.storage.anyOf[0]?.properties.config.properties ?? {}))
})

type Section = Readonly<Record<string, unknown>>

async function check(file: string): Promise<{ code: number; output: string }> {
  const child = spawn(process.execPath, [bin('rackswarm-server'), '--config', file, '--check'])
  let output = ''
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk: Buffer) => (output += chunk.toString()))
  const [code] = (await once(child, 'close')) as [number]
  return { code, output }
}

/** Keys with a value, and the key of the section that they stand in; of a hook its name and the keys of its options. */
function leavesOf(section: Section, name = ''): { section: string; key: string }[] {
  return Object.entries(section).flatMap(([key, value]) => {
    if (key === 'prehooks')
      return (value as { name: string; options: Section }[]).flatMap((hook) => [
        { section: 'prehooks', key: hook.name },
        ...Object.keys(hook.options).map((option) => ({ section: hook.name, key: option })),
      ])
    return typeof value === 'object' && value !== null && !Array.isArray(value)
      ? leavesOf(value as Section, key)
      : [{ section: name, key }]
  })
}

import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { z } from 'zod'
import { AgentConfig } from '../../agent/config.ts'
import { ConfigError, loadConfig, parseConfig } from '../../lib/runtime/config.ts'
import { RedisStorage, ServerConfig } from '../../server/config.ts'

const configs = join(import.meta.dirname, '..', '..', 'configs')

test('the sample files load, and say the defaults: with every # taken away nothing changes', async () => {
  for (const [name, schema, needed] of [
    ['server', ServerConfig, ''],
    ['agent', AgentConfig, 'server: https://rackswarm.example.com:6969\n'],
  ] as const) {
    const file = join(configs, `${name}.yaml`)
    const sample = await loadConfig(schema, file)
    assert.deepEqual(sample, parseConfig(schema, needed, 'empty'))
    const settings = (await readFile(file, 'utf8'))
      .split('\n')
      .filter((line) => /^#?(?: {2,})?[a-z_0-9]+:/.test(line))
      .map((line) => line.replace(/^#/, ''))
    const indent = (line: string | undefined) =>
      line === undefined ? 0 : line.length - line.trimStart().length
    // A section that is only there where it is asked for has settings that must be given.
    for (const section of optionalSections(z.toJSONSchema(schema, { io: 'input', unrepresentable: 'any' }))) {
      const start = settings.findIndex((line) => line.trimStart() === `${section}:`)
      const after = settings.findIndex((line, i) => i > start && indent(line) <= indent(settings[start]))
      assert.ok(start > 0 && after > start, section)
      settings.splice(start, after - start)
    }
    // A setting without a default has no value to set, nor has a section of such settings.
    for (let i = settings.length - 1; i >= 0; i--) {
      const line = settings[i] ?? ''
      if (line.endsWith(':') && indent(settings[i + 1]) <= indent(line)) settings.splice(i, 1)
    }
    assert.ok(settings.length > 15)
    assert.deepEqual(parseConfig(schema, settings.join('\n'), 'all set'), sample)
  }
})

test('the sample for Redis loads, and names every setting of redis and of its store', async () => {
  const file = join(configs, 'server.redis.yaml')
  const config = await loadConfig(ServerConfig, file)
  assert.equal(config.storage.name, 'redis')
  const text = await readFile(file, 'utf8')
  const { redis } = ServerConfig.shape
  for (const key of [...Object.keys(redis.unwrap().shape), ...Object.keys(RedisStorage.shape)])
    assert.match(text, new RegExp(`^ *(# )?${key}:`, 'm'), key)
  // A value that is the default elsewhere is the default here.
  assert.deepEqual(RedisStorage.parse(config.storage.config), RedisStorage.parse({}))
})

test('every fault of a configuration is told at once, with its place', () => {
  const text = 'http:\n  addr: nowhere\n  port: 1\nannounce_interval: soon\ntracker: { numwant_max: 0 }\n'
  assert.throws(
    () => parseConfig(ServerConfig, text, 'server.yaml'),
    (error) => {
      assert.ok(error instanceof ConfigError)
      const faults = error.faults.join('\n')
      for (const place of [
        /server\.yaml:2:3 http\.addr: /,
        /server\.yaml:3:3 http\.port: there is no such setting/,
        /server\.yaml:4:1 announce_interval: need a duration/,
        /server\.yaml:5:12 tracker\.numwant_max: /,
      ])
        assert.match(faults, place)
      return true
    },
  )
})

interface Schema {
  readonly properties?: Readonly<Record<string, Schema | boolean>>
  readonly default?: unknown
}

function optionalSections({ properties = {} }: Schema): string[] {
  return Object.entries(properties).flatMap(([key, member]) => {
    if (typeof member === 'boolean' || !member.properties) return []
    return member.default === undefined ? [key] : optionalSections(member)
  })
}

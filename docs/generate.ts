// npm run docs: writes what follows from the configuration schemas: docs/configuration.md, the tables of docs/hooks.md, the
// sample files and the JSON schemas in configs/. With --check it only compares, and fails where a file is out of step.
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { format, resolveConfig } from 'prettier'
import { z } from 'zod'
import { AgentConfig } from '../agent/config.ts'
import { MemoryStorage, ServerConfig } from '../server/config.ts'
import { builtInPreHooks } from '../server/tracker/hooks/built-in.ts'

interface Schema {
  readonly type?: string | readonly string[]
  readonly description?: string
  readonly default?: unknown
  readonly enum?: readonly unknown[]
  readonly const?: unknown
  readonly properties?: Readonly<Record<string, Schema>>
  readonly items?: Schema
  readonly anyOf?: readonly Schema[]
  readonly additionalProperties?: Schema | boolean
  readonly pattern?: string
  readonly minimum?: number
  readonly maximum?: number
  readonly required?: readonly string[]
}

const root = join(import.meta.dirname, '..')
const memory = jsonOf(MemoryStorage)
const programs = [
  {
    name: 'server',
    program: 'rackswarm-server',
    json: jsonOf(ServerConfig),
    /** For editors: what the names of hooks and of the store decide, which the table tells in other places. */
    withNames: withNamedParts,
    /** What a sample must set, since there is no default. */
    sample: {},
    /** Settings whose content no default shows: an example each. */
    examples: new Map([
      ['storage.config', [writeFlow(defaultsOf(memory))]],
      [
        'registry.trust',
        [
          "- { name: ci, issuer: 'https://token.actions.githubusercontent.com', claims: { repository_id: '123' }, grants: ['publish:web'] }",
        ],
      ],
      [
        'prehooks',
        [
          '- { name: network approval, options: { whitelist: [10.0.0.0/8] } }',
          '- { name: rate limit, options: { per_address: { rate: 10, burst: 50 } } }',
          '- { name: torrent approval, options: { whitelist_file: /etc/rackswarm/torrents.txt } }',
        ],
      ],
      [
        'registry.retention',
        [
          '- { repositories: [web, team/*], tags: "pr-*", keep_newer_than: 7d }',
          '- { repositories: ["*"], keep_last: 20, keep_newer_than: 30d, keep_deployed: true }',
        ],
      ],
    ]),
  },
  {
    name: 'agent',
    program: 'rackswarm-agent',
    json: jsonOf(AgentConfig),
    withNames: (json: Schema) => json,
    sample: { server: 'https://rackswarm.example.com:6969' },
    examples: new Map([
      [
        'signatures.repositories',
        [
          "- { match: ['payments/*'], keys: [/etc/rackswarm/payments.pub] }",
          '- { match: [lab], policy: accept_unsigned }',
        ],
      ],
    ]),
  },
]

const files = new Map<string, string>()
const sections: string[] = []
for (const program of programs) {
  const { name, json, withNames } = program
  files.set(
    `configs/${name}.schema.json`,
    JSON.stringify({ title: `${name}.yaml of Rackswarm`, ...withNames(json) }),
  )
  files.set(`configs/${name}.yaml`, sampleFile(program))
  sections.push(`## ${name}.yaml\n\n${table('setting', json)}`)
}
files.set(
  'docs/configuration.md',
  `# Configuration

<!-- Written by npm run docs from server/config.ts and agent/config.ts; npm run check compares. -->

Both programs read one YAML file: \`--config FILE\`, else \`/etc/rackswarm/server.yaml\` or \`agent.yaml\` if it is there. The server also
runs with none. Reading is strict: an unknown setting, or any other fault, is an error with \`file:line:column\`, all of them at once, and nothing is
repaired. \`--check\` only reads the file; \`--print-config\` prints every setting in force.

Durations are written \`250ms\`, \`10s\`, \`30m\`, \`12h\`, \`7d\`; sizes \`64KiB\`, \`256MiB\`, \`20GiB\` or \`1.5GB\`. Samples with every default:
[configs/server.yaml](../configs/server.yaml), [configs/agent.yaml](../configs/agent.yaml). For editors:
[server.schema.json](../configs/server.schema.json), [agent.schema.json](../configs/agent.schema.json).

${sections.join('\n\n')}

## storage.config of the memory store

With \`storage.name: memory\`, which is the default. How much memory that takes: [docs/operations.md](operations.md#memory).

${table('setting', memory)}

The options of the hooks that ship with the tracker: [docs/hooks.md](hooks.md).

## topology

Racks, their parents and their networks, in \`server.yaml\`:

\`\`\`yaml
topology:
  levels: [rack, row, { name: zone, cost: 20, capacity: 40Gb }]
  places:
    r17: { parents: [row-2, ams1] }
  prefixes:
    - { cidr: 10.2.17.0/24, place: r17 }
  table: racks.csv
\`\`\`

A host is in the place that its token names, else in that of the longest network of \`prefixes\` and \`table\` around its address, else in a place of its
own network: its /24 or /64 (\`ipv4_prefix_length\`, \`ipv6_prefix_length\`). Networks may lie within each other as deep as they like. The same one with two
places is an error that names both lines, wherever they are.

\`table\` is a CSV file:

\`\`\`
cidr,place
# row 2
10.2.0.0/16,r-spare
10.2.17.0/24,r17      # within the one above
2001:db8:2:17::/64,r17
\`\`\`

Every fault has its line, and a running server keeps the table it has: \`deployctl topology check\` tells before. A thread of its own reads it, so announces do not wait.
Replace the file by renaming a new one over it.

\`cost\` and \`capacity\` say what far bytes cost. The peers of a reply that are not of the own rack are shared among the distances in proportion to
capacity ÷ cost of the way: out of the rack, out of the rack and the row, and so on. Costs of a way add up, and its capacity is that of its narrowest
level; a level without a cost costs 1. With the levels above, leaving the zone costs 22 where leaving the row costs 2. Each distance keeps one peer, so that no zone is an island.
Without any of them each distance has half of what nearer ones leave. Both may change while the server runs; the number of levels may not.
`,
)
files.set('docs/hooks.md', await withOptionTables(await readFile(join(root, 'docs', 'hooks.md'), 'utf8')))

const check = process.argv.includes('--check')
for (const [path, text] of files) {
  const file = join(root, path)
  // The words of docs/hooks.md are a person's.
  const wanted = path === 'docs/hooks.md' ? text : await formatted(text, file)
  const found = await readFile(file, 'utf8').catch(() => '')
  if (found === wanted) continue
  if (check) {
    process.stderr.write(`${path} is not what the schemas say: run npm run docs\n`)
    process.exitCode = 1
  } else {
    await writeFile(file, wanted)
    process.stderr.write(`${path} written\n`)
  }
}

function jsonOf(schema: z.ZodType): Schema {
  return z.toJSONSchema(schema, { io: 'input', unrepresentable: 'any' }) as Schema
}

async function formatted(text: string, file: string): Promise<string> {
  return format(text, { ...(await resolveConfig(file)), filepath: file })
}

/** A hook that ships with the tracker has the options that it has; one with a path has any. The same for the store. */
function withNamedParts(json: Schema): Schema {
  const { prehooks, posthooks, storage } = json.properties ?? {}
  const hook = prehooks?.items
  if (!prehooks || !posthooks || !storage || !hook)
    throw new Error('Cannot find the hooks and the store in the schema')
  const module = {
    ...hook,
    properties: { ...hook.properties, name: { type: 'string', pattern: '^(/|\\.\\.?/)' } },
  }
  const named = builtInPreHooks.map(({ name, options }) => ({
    ...hook,
    properties: { name: { const: name }, options: nested(jsonOf(options)) },
  }))
  const inMemory = { properties: { name: { const: 'memory' }, config: nested(memory) } }
  const elsewhere = { properties: { name: { type: 'string', pattern: '^(/|\\.\\.?/)' } }, required: ['name'] }
  return {
    ...json,
    properties: {
      ...json.properties,
      prehooks: { ...prehooks, items: { anyOf: [...named, module] } },
      posthooks: { ...posthooks, items: module },
      storage: { ...storage, anyOf: [inMemory, elsewhere] },
    },
  }
}

/** A schema within another: only the outermost one says which dialect it is in. */
function nested(schema: Schema): Schema {
  return Object.fromEntries(Object.entries(schema).filter(([key]) => key !== '$schema'))
}

/** Fills in what follows each `<!-- options of NAME -->`. @throws Error naming a hook that has no place, or is not there */
async function withOptionTables(text: string): Promise<string> {
  const missing = new Set<string>(builtInPreHooks.map(({ name }) => name))
  let filled = ''
  let at = 0
  for (const match of text.matchAll(/(<!-- options of ([\w ]+) -->\n)[^]*?(?=<!-- end of options -->)/g)) {
    const [whole, start = '', name = ''] = match
    const hook = builtInPreHooks.find((known) => known.name === name)
    if (!hook) throw new Error(`docs/hooks.md: there is no hook of the name ${name}`)
    missing.delete(name)
    const options = await format(table('option', jsonOf(hook.options)), { parser: 'markdown' })
    filled += `${text.slice(at, match.index)}${start}\n${options}\n`
    at = match.index + whole.length
  }
  if (missing.size > 0)
    throw new Error(
      `docs/hooks.md: need <!-- options of NAME --> and <!-- end of options --> for ${[...missing].join(', ')}`,
    )
  return filled + text.slice(at)
}

function table(first: string, json: Schema): string {
  const required = new Set(json.required?.filter((key) => json.properties?.[key]?.default === undefined))
  return [
    `| ${first} | type | default | what it does |`,
    '|---|---|---|---|',
    ...rows(json, '', required),
  ].join('\n')
}

function rows(schema: Schema, prefix: string, required: ReadonlySet<string>): string[] {
  return Object.entries(schema.properties ?? {}).flatMap(([key, member]) => {
    const name = `${prefix}${key}`
    const own = `| \`${name}\` | ${typeOf(member)} | ${required.has(key) ? 'required' : defaultOf(member)} | ${cell(member.description ?? '')} |`
    return member.properties ? [own, ...rows(member, `${name}.`, new Set())] : [own]
  })
}

function typeOf(schema: Schema): string {
  if (schema.properties) return 'section'
  if (schema.enum) return schema.enum.map((value) => `\`${String(value)}\``).join(', ')
  if (schema.const !== undefined) return `\`${JSON.stringify(schema.const)}\``
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(' or ')
  if (schema.pattern?.includes('ms|s|m|h|d')) return 'duration'
  if (schema.pattern?.includes('KiB')) return 'size'
  if (schema.type === 'array')
    return schema.items?.properties
      ? `list of ${shapeOf(schema.items)}`
      : `list of ${schema.items?.anyOf ? schema.items.anyOf.map((one) => (one.properties ? shapeOf(one) : typeOf(one))).join(' or ') : schema.items ? typeOf(schema.items) : 'text'}`
  if (schema.type === 'object') return 'map'
  if (schema.type === 'integer') return 'whole number'
  if (schema.type === 'number') return 'number'
  if (schema.type === 'boolean') return 'true or false'
  return 'text'
}

function shapeOf({ properties = {} }: Schema): string {
  return `{ ${Object.keys(properties).join(', ')} }`
}

function defaultsOf({ properties = {} }: Schema): Record<string, unknown> {
  return Object.fromEntries(Object.entries(properties).map(([key, member]) => [key, member.default]))
}

/** A map on one line of YAML. */
function writeFlow(members: Record<string, unknown>): string {
  return `{ ${Object.entries(members)
    .map(([key, value]) => `${key}: ${String(value)}`)
    .join(', ')} }`
}

function defaultOf(schema: Schema): string {
  if (schema.properties || schema.default === undefined) return ''
  return `\`${typeof schema.default === 'string' ? schema.default : JSON.stringify(schema.default)}\``
}

function cell(text: string): string {
  return text.replaceAll('|', '\\|').replaceAll('\n', ' ')
}

/** Every setting with its default as a comment, so that the sample changes nothing until the # before a setting goes. */
function sampleFile({ name, program, json, sample, examples }: (typeof programs)[number]): string {
  const lines = [
    `# /etc/rackswarm/${name}.yaml: every setting of ${program} with its default; take away the # to change one.`,
    `# Written by npm run docs. What each one trades: docs/configuration.md.`,
    `# yaml-language-server: $schema=${name}.schema.json`,
    '',
  ]
  const write = (members: Schema, path: string, indent: string) => {
    for (const [key, member] of Object.entries(members.properties ?? {})) {
      const given = indent === '' ? (sample as Record<string, unknown>)[key] : undefined
      lines.push(...wrapped(member.description ?? '', indent === '' ? '# ' : `#${indent}# `))
      if (member.properties) {
        lines.push(`#${indent}${key}:`)
        write(member, `${path}${key}.`, `${indent}  `)
      } else {
        const value = given ?? member.default
        lines.push(
          given === undefined
            ? `#${indent}${key}:${value === undefined ? '' : ` ${JSON.stringify(value)}`}`
            : `${indent}${key}: ${JSON.stringify(given)}`,
        )
        const prefix = indent === '' ? '#   ' : `#${indent}#   `
        lines.push(...(examples.get(`${path}${key}`) ?? []).map((example) => `${prefix}${example}`))
      }
      if (indent === '') lines.push('')
    }
  }
  write(json, '', '')
  return `${lines.join('\n')}\n`
}

function wrapped(text: string, prefix: string): string[] {
  const lines: string[] = []
  let line = ''
  for (const word of text.split(/\s+/).filter(Boolean)) {
    if (line !== '' && prefix.length + line.length + word.length > 108) {
      lines.push(`${prefix}${line}`)
      line = word
    } else line = line === '' ? word : `${line} ${word}`
  }
  return line === '' ? lines : [...lines, `${prefix}${line}`]
}

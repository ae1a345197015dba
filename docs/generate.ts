// npm run docs: writes what follows from the configuration schemas: docs/configuration.md, the sample files and the JSON
// schemas in configs/. With --check it only compares, and fails where a file is out of step.
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { format, resolveConfig } from 'prettier'
import { z } from 'zod'
import { AgentConfig } from '../agent/config.ts'
import { ServerConfig } from '../server/config.ts'

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
const programs = [
  {
    name: 'server',
    program: 'rackswarm-server',
    schema: ServerConfig,
    /** What a sample must set, since there is no default. */
    sample: {},
  },
  {
    name: 'agent',
    program: 'rackswarm-agent',
    schema: AgentConfig,
    sample: { server: 'https://rackswarm.example.com:6969' },
  },
]

const files = new Map<string, string>()
const sections: string[] = []
for (const { name, program, schema, sample } of programs) {
  const json = z.toJSONSchema(schema, { io: 'input', unrepresentable: 'any' }) as Schema
  files.set(`configs/${name}.schema.json`, JSON.stringify({ title: `${name}.yaml of Rackswarm`, ...json }))
  files.set(`configs/${name}.yaml`, sampleFile(name, program, json, sample))
  sections.push(
    [
      `## ${name}.yaml`,
      '',
      '| setting | type | default | what it does |',
      '|---|---|---|---|',
      ...rows(
        json,
        '',
        new Set(json.required?.filter((key) => json.properties?.[key]?.default === undefined)),
      ),
    ].join('\n'),
  )
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

Racks, their parents and their networks, in \`server.yaml\`:

\`\`\`yaml
topology:
  levels: [rack, row, datacentre]
  places:
    r17: { parents: [row-2, ams1] }
  prefixes:
    - { cidr: 10.2.17.0/24, place: r17 }
\`\`\`
`,
)

const check = process.argv.includes('--check')
for (const [path, text] of files) {
  const file = join(root, path)
  const wanted = await format(text, { ...(await resolveConfig(file)), filepath: file })
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
      ? `list of { ${Object.keys(schema.items.properties).join(', ')} }`
      : `list of ${schema.items ? typeOf(schema.items) : 'text'}`
  if (schema.type === 'object') return 'map'
  if (schema.type === 'integer') return 'whole number'
  if (schema.type === 'boolean') return 'true or false'
  return 'text'
}

function defaultOf(schema: Schema): string {
  if (schema.properties || schema.default === undefined) return ''
  return `\`${typeof schema.default === 'string' ? schema.default : JSON.stringify(schema.default)}\``
}

function cell(text: string): string {
  return text.replaceAll('|', '\\|').replaceAll('\n', ' ')
}

/** Every setting with its default as a comment, so that the sample changes nothing until the # before a setting goes. */
function sampleFile(name: string, program: string, schema: Schema, sample: Record<string, unknown>): string {
  const lines = [
    `# /etc/rackswarm/${name}.yaml: every setting of ${program} with its default; take away the # to change one.`,
    `# Written by npm run docs. What each one trades: docs/configuration.md.`,
    `# yaml-language-server: $schema=${name}.schema.json`,
    '',
  ]
  const write = (members: Schema, indent: string) => {
    for (const [key, member] of Object.entries(members.properties ?? {})) {
      const given = indent === '' ? sample[key] : undefined
      lines.push(...wrapped(member.description ?? '', indent === '' ? '# ' : `#${indent}# `))
      if (member.properties) {
        lines.push(`#${indent}${key}:`)
        write(member, `${indent}  `)
      } else {
        const value = given ?? member.default
        lines.push(
          given === undefined
            ? `#${indent}${key}:${value === undefined ? '' : ` ${JSON.stringify(value)}`}`
            : `${indent}${key}: ${JSON.stringify(given)}`,
        )
      }
      if (indent === '') lines.push('')
    }
  }
  write(schema, '')
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

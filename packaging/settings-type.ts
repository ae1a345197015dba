// Writes a configuration schema as a TypeScript interface without zod, for those who give the settings as an object.
import { z } from 'zod'

interface Schema {
  readonly type?: string
  readonly description?: string
  readonly default?: unknown
  readonly enum?: readonly unknown[]
  readonly const?: unknown
  readonly properties?: Readonly<Record<string, Schema>>
  readonly items?: Schema
  readonly anyOf?: readonly Schema[]
  readonly additionalProperties?: Schema | boolean
  readonly required?: readonly string[]
}

/** `interface NAME { … }` for what the schema takes, but for the settings in `omitted`, and with what `told` says of those in it. */
export function settingsType(
  name: string,
  schema: z.ZodType,
  { omitted, told }: { omitted: readonly string[]; told: Readonly<Record<string, string>> },
): string {
  const { properties = {}, ...rest } = z.toJSONSchema(schema, {
    io: 'input',
    unrepresentable: 'any',
    reused: 'inline',
  }) as Schema
  const kept = Object.fromEntries(
    Object.entries(properties)
      .filter(([key]) => !omitted.includes(key))
      .map(([key, member]) => {
        const description = told[key]
        return [key, description === undefined ? member : { ...member, description, default: undefined }]
      }),
  )
  return `interface ${name} ${typeOf({ ...rest, properties: kept }, '')}`
}

function typeOf(schema: Schema, indent: string): string {
  if (schema.const !== undefined) return JSON.stringify(schema.const)
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(' | ')
  if (schema.anyOf) return schema.anyOf.map((one) => typeOf(one, indent)).join(' | ')
  if (schema.properties) return membersOf(schema, indent)
  switch (schema.type) {
    case 'string':
    case 'boolean':
      return schema.type
    case 'integer':
    case 'number':
      return 'number'
    case 'array':
      return `readonly ${listed(typeOf(schema.items ?? {}, indent))}[]`
    case 'object':
      return `{ readonly [name: string]: ${typeof schema.additionalProperties === 'object' ? typeOf(schema.additionalProperties, indent) : 'unknown'} }`
    default:
      return 'unknown'
  }
}

function listed(type: string): string {
  return type.includes(' | ') && !type.startsWith('{') ? `(${type})` : type
}

function membersOf({ properties = {}, required = [] }: Schema, indent: string): string {
  const inner = `${indent}    `
  const members = Object.entries(properties).map(([key, member]) => {
    // What has a default need not be given.
    const must = required.includes(key) && member.default === undefined
    const type = typeOf(member, inner)
    return `${inner}/** ${commentOf(member)} */\n${inner}readonly ${key}${must ? '' : '?'}: ${type}${must ? '' : ' | undefined'};\n`
  })
  return `{\n${members.join('')}${indent}}`
}

function commentOf({ description = '', default: value }: Schema): string {
  const isSaid = value === undefined || (typeof value === 'object' && value !== null && !Array.isArray(value))
  return [description, ...(isSaid ? [] : [`Default: ${JSON.stringify(value)}.`])]
    .join(' ')
    .replaceAll('*/', '* /')
}

import { readFile } from 'node:fs/promises'
import { parseDocument, stringify } from 'yaml'
import { z } from 'zod'

/**
 * The configuration in force as YAML: what the file says, and the default of everything it leaves out. It loads
 * back to the same configuration. Call it with a file that `loadConfig` has accepted, or undefined for none.
 */
export async function printConfig(schema: z.ZodType, file: string | undefined): Promise<string> {
  const given: unknown = file === undefined ? {} : parseDocument(await readFile(file, 'utf8')).toJS()
  return stringify(
    withDefaults(z.toJSONSchema(schema, { io: 'input', unrepresentable: 'any' }) as JsonSchema, given ?? {}),
    {
      lineWidth: 0,
    },
  )
}

interface JsonSchema {
  readonly properties?: Readonly<Record<string, JsonSchema>>
  readonly default?: unknown
}

function withDefaults(schema: JsonSchema, given: unknown): unknown {
  const value = given === undefined ? schema.default : given
  if (schema.properties === undefined || (value !== undefined && !isObject(value))) return value
  const members = Object.entries(schema.properties)
    .map(([key, member]) => [key, withDefaults(member, value?.[key])] as const)
    .filter(([, member]) => member !== undefined)
  return members.length === 0 && value === undefined ? undefined : Object.fromEntries(members)
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

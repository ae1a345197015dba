import { z } from 'zod'
import { ClientError } from '../../../lib/protocol/errors.ts'
import type { HookDeps, PreHookDefinition } from '../hooks.ts'
import type { ClientEntry, ClientSet } from './client-set.ts'
import { createClientSet, parseClientEntry, parseVersionRange } from './client-set.ts'
import type { ListHook } from './list-options.ts'
import { listOptions, openList } from './list-options.ts'
import type { ListFormat } from './watched-list.ts'

const name = 'client approval'

const version = z.string()

/** An entry in the configuration: a text as in a file, or versions as a section. */
const entry = z
  .union(
    [
      z.string(),
      z.strictObject({
        client: z.string().describe('The two characters of an Azureus-style peer id: TR in -TR4050-.'),
        from: version.optional().describe('Oldest version, such as "3.0.0", "3.00" or "3000".'),
        to: version.optional().describe('Newest version, itself included.'),
      }),
    ],
    'need a text, such as AZ3034, or { client, from, to } with the versions in quotes',
  )
  .transform((written, context): ClientEntry => {
    try {
      return typeof written === 'string' ? parseClientEntry(written) : parseVersionRange(written)
    } catch (error) {
      context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) })
      return z.NEVER
    }
  })

const options = listOptions(entry, {
  what: 'clients',
  line: 'one client ID (AZ3034) or the start of one (AZ), start of a peer id (-AZ30) or range of versions (TR >= 3.0.0, TR 3.0.0..4.0.5)',
})

/** Admits announces of approved clients, as far as peer ids tell the truth. */
export const clientApproval = {
  name,
  options,
  async create(options, deps: HookDeps): Promise<ListHook> {
    const list = await openList(options, clients, deps)
    return {
      name,
      list,
      announce: ({ announce }) => {
        if (list.current.has(announce.peerId) !== (list.kind === 'whitelist')) throw unapproved
      },
      [Symbol.asyncDispose]: () => list[Symbol.asyncDispose](),
    }
  },
} satisfies PreHookDefinition<typeof options>

/** One for all: under a flood, the stack trace of a new one would cost more than the answer. */
const unapproved = new ClientError('unapproved_client', 'unapproved client')

const clients: ListFormat<ClientEntry, ClientSet> = {
  entriesMax: 10_000,
  lineBytesMin: 2,
  parse: parseClientEntry,
  create: createClientSet,
}

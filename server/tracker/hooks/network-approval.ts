import type { Ip } from '../../../lib/protocol/address.ts'
import type { Cidr } from '../../../lib/protocol/cidr.ts'
import { parseCidr } from '../../../lib/protocol/cidr.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import { parsed } from '../../../lib/runtime/config.ts'
import type { HookDeps, PreHookDefinition } from '../hooks.ts'
import type { ListHook } from './list-options.ts'
import { listOptions, openList } from './list-options.ts'
import type { NetworkSet } from './network-set.ts'
import { createNetworkSet } from './network-set.ts'
import type { ListFormat } from './watched-list.ts'

const name = 'network approval'
const options = listOptions(parsed(parseCidr), {
  what: 'networks',
  line: 'one network such as 10.0.0.0/8, or one address,',
})

/** Admits announces and scrapes from approved networks. */
export const networkApproval = {
  name,
  options,
  async create(options, deps: HookDeps): Promise<ListHook> {
    const list = await openList(options, networks, deps)
    const check = ({ source }: { readonly source: Ip }) => {
      if (list.current.has(source) !== (list.kind === 'whitelist')) throw unapproved
    }
    return {
      name,
      list,
      announce: check,
      scrape: check,
      [Symbol.asyncDispose]: () => list[Symbol.asyncDispose](),
    }
  },
} satisfies PreHookDefinition<typeof options>

/** One for all: under a flood, the stack trace of a new one would cost more than the answer. */
const unapproved = new ClientError('unapproved_network', 'unapproved network')

const networks: ListFormat<Cidr, NetworkSet> = {
  entriesMax: 1_000_000,
  // `::` is a network of one address.
  lineBytesMin: 3,
  parse: parseCidr,
  create: createNetworkSet,
}

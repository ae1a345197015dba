import type { AddressPlace, TopologyCheck, TopologyExplanation } from '../lib/client/api.ts'
import type { Ip } from '../lib/protocol/address.ts'
import { formatIp, parseIp } from '../lib/protocol/address.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import type { OpenedTopology } from './open-topology.ts'
import type { PrefixRule } from './tracker/prefix-table.ts'
import { countRules, rulesOf } from './tracker/prefix-table.ts'
import { describeSource, sourceOf } from './tracker/topology.ts'

const addressesMax = 100
/** Warnings that are shown; of the others there is the number. */
const warningsShown = 20

/** Says where addresses are, why, and how far from each other. @throws ClientError for what is no address */
export function explainAddresses(opened: OpenedTopology, texts: readonly string[]): TopologyExplanation {
  if (texts.length < 1 || texts.length > addressesMax)
    throw new ClientError(
      'bad_address',
      `Cannot explain ${texts.length} addresses: need 1 to ${addressesMax}`,
    )
  const ips = texts.map(readAddress)
  const [first, ...others] = ips
  return {
    addresses: ips.map((ip) => explainAddress(opened, ip)),
    distances: first ? others.map((other) => distanceBetween(opened, first, other)) : [],
  }
}

/** What a topology consists of, and what is odd about it. */
export function summarizeTopology({ topology, config, table }: OpenedTopology): TopologyCheck & { ok: true } {
  const families = { 4: config.ipv4PrefixLength, 6: config.ipv6PrefixLength }
  const networks = (family: 4 | 6) => ({
    ...countRules(topology.table, family),
    otherwise: `/${families[family]}`,
  })
  return {
    ok: true,
    levels: config.levels.map((level) => (typeof level === 'string' ? { name: level } : level)),
    farShares: farSharesOf(topology.shares),
    ...(table && { table: table.file }),
    places: { withNetworks: topology.table.places.length, listed: Object.keys(config.places).length },
    ipv4: networks(4),
    ipv6: networks(6),
    warnings: topology.levels > 1 ? warningsOf({ topology, config, table }) : [],
  }
}

function explainAddress(opened: OpenedTopology, ip: Ip): AddressPlace {
  const { place, network, rule, listed, parents, lost } = opened.topology.explain(ip)
  return {
    address: formatIp(ip),
    place,
    network,
    from: rule ? describe(opened, rule) : `topology.ipv${ip.family}_prefix_length`,
    listed,
    parents: [...parents],
    lost: lost.map((one) => ({ network: one.network, place: one.place, from: describe(opened, one) })),
  }
}

/** As a store finds it: the nearest node that both are under. */
function distanceBetween({ topology, config }: OpenedTopology, a: Ip, b: Ip) {
  const [from, to] = [topology.placeOfAddress(a), topology.placeOfAddress(b)]
  const above = new Set(topology.ancestorsOf(to).map(({ node }) => node))
  const distance =
    from === to
      ? 0
      : (topology.ancestorsOf(from).find(({ node }) => above.has(node))?.distance ?? topology.levels)
  const level = config.levels[distance]
  return {
    from: formatIp(a),
    to: formatIp(b),
    distance,
    ...(level !== undefined && { level: typeof level === 'string' ? level : level.name }),
  }
}

/** Places with networks that would be racks of their own under the root, though the levels mean them to be somewhere. */
function warningsOf({ topology, config, table }: OpenedTopology): string[] {
  const seen = new Set<string>(Object.keys(config.places))
  const warnings: string[] = []
  let more = 0
  for (const rule of rulesOf(topology.table)) {
    if (seen.has(rule.place)) continue
    seen.add(rule.place)
    if (warnings.length < warningsShown)
      warnings.push(
        `${describe({ table }, rule)}: ${rule.place} is not in topology.places, so it is under no ${nameOf(config.levels[1])}: as far from everyone as can be`,
      )
    else more++
  }
  return more > 0 ? [...warnings, `and ${more} more places that are not in topology.places`] : warnings
}

function nameOf(level: OpenedTopology['config']['levels'][number] | undefined): string {
  return typeof level === 'string' ? level : (level?.name ?? 'level')
}

/** Of all far places of a reply, where each level has peers enough. */
function farSharesOf(shares: readonly number[]): number[] {
  let left = 1
  return shares.slice(1).map((share) => {
    const part = left * share
    left -= part
    return part
  })
}

function describe({ table }: Pick<OpenedTopology, 'table'>, rule: PrefixRule): string {
  const source = sourceOf(rule)
  return source.kind === 'table' && table ? `${table.file}:${source.line}` : describeSource(rule)
}

function readAddress(text: string): Ip {
  const ip = parseIp(text)
  if (!ip)
    throw new ClientError(
      'bad_address',
      `Cannot read address ${JSON.stringify(text.slice(0, 64))}: need one such as 10.2.17.9 or fd00::1`,
    )
  return ip
}

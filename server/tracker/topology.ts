import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import { distanceUnknown } from '../../lib/protocol/announce.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import type { Place } from '../../lib/protocol/place.ts'
import { createPrefixTable } from './prefix-table.ts'

/** A place as a small integer, stable for the life of the process; stores keep these, not names. */
export type PlaceId = number

/**
 * Where hosts are and how far apart. A place is a leaf name (a rack); its parents come only from configuration.
 * A leaf that no configuration names is its own rack directly under the root.
 */
export interface Topology {
  /** The id of a named place; beyond `placesMax` names: the id of `unknown`. */
  idOf(place: Place): PlaceId
  nameOf(id: PlaceId): string
  /** The place of an address: the longest prefix of the table, else the masked prefix itself as a place. */
  placeOfAddress(ip: Ip): PlaceId
  /** 0 the same rack, 1 the same parent …, the number of levels for places that share only the root; 255 where either is unknown. */
  distance(a: PlaceId, b: PlaceId): number
}

export interface TopologyConfig {
  /** Names of the levels, nearest first. */
  readonly levels: readonly string[]
  /** Each listed leaf's parents, nearest first: one for each level above its own. */
  readonly places: Readonly<Record<string, { readonly parents: readonly string[] }>>
  readonly prefixes: readonly { readonly cidr: Cidr; readonly place: Place }[]
  readonly ipv4PrefixLength: number
  readonly ipv6PrefixLength: number
}

/** Names come from tokens and addresses too, so a stranger could otherwise grow the table without end. */
const placesMax = 65_536
const unknown: PlaceId = 0

/** @throws Error that names every place without all its parents, and every prefix that is given two places */
export function createTopology(config: TopologyConfig): Topology {
  const levels = Math.max(1, config.levels.length)
  checkPlaces(config, levels)
  const table = createPrefixTable(config.prefixes)
  const names = ['unknown']
  const ids = new Map<string, PlaceId>()
  const ancestors: (readonly string[])[] = [[]]

  const intern = (name: string): PlaceId => {
    const known = ids.get(name)
    if (known !== undefined) return known
    if (names.length > placesMax) return unknown
    const id = names.length
    names.push(name)
    ids.set(name, id)
    const listed = Object.hasOwn(config.places, name) ? config.places[name] : undefined
    ancestors.push(listed?.parents ?? [])
    return id
  }

  return {
    idOf: intern,
    nameOf: (id) => names[id] ?? 'unknown',
    placeOfAddress: (ip) =>
      intern(
        table.find(ip) ??
          maskedPrefix(ip, ip.family === 4 ? config.ipv4PrefixLength : config.ipv6PrefixLength),
      ),
    distance: (a, b) => {
      if (a === unknown || b === unknown) return distanceUnknown
      if (a === b) return 0
      const [ofA, ofB] = [ancestors[a] ?? [], ancestors[b] ?? []]
      for (let level = 1; level < levels; level++) {
        const parent = ofA[level - 1]
        if (parent !== undefined && parent === ofB[level - 1]) return level
      }
      return levels
    },
  }
}

/** `10.1.2.0/24`: how an address without a configured place is placed. */
function maskedPrefix({ family, bytes }: Ip, length: number): string {
  const masked = bytes.map((byte, i) => byte & (0xff << Math.max(0, Math.min(8, 8 - (length - 8 * i)))))
  return `${formatIp({ family, bytes: masked })}/${length}`
}

function checkPlaces({ places, levels: names }: TopologyConfig, levels: number): void {
  const faults = Object.entries(places)
    .filter(([, { parents }]) => parents.length !== levels - 1)
    .map(
      ([name, { parents }]) =>
        `topology.places.${name}: got ${parents.length} parents, need ${levels - 1} (${names.slice(1).join(', ')})`,
    )
  if (faults.length > 0) throw new Error(faults.join('\n'))
}

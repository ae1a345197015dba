import type { Ip } from '../../lib/protocol/address.ts'
import type { Place } from '../../lib/protocol/place.ts'

/** A place as a small integer, stable for the life of the process; stores keep these, not names. */
export type PlaceId = number

/**
 * Where hosts are and how far apart. A place is a leaf name (a rack); its parents come only from configuration.
 * A leaf that no configuration names is its own rack directly under the root.
 */
export interface Topology {
  /** The id of a named place; unknown names get a new id (bounded by `placesMax`, beyond it: the `unknown` place). */
  idOf(place: Place): PlaceId
  nameOf(id: PlaceId): string
  /** The place of an address: the longest prefix of the table, else the masked prefix itself as a place. */
  placeOfAddress(ip: Ip): PlaceId
  /** 0 the same rack, 1 the same parent …; 255 where either place is unknown. */
  distance(a: PlaceId, b: PlaceId): number
}

/** Clients, told from the 20 bytes of a peer id. */
export type ClientEntry =
  /** The start of the client ID, or all its six bytes. */
  | { readonly kind: 'client'; readonly start: string }
  /** The start of the peer id. */
  | { readonly kind: 'peer_id'; readonly start: string }
  /** Azureus-style peer ids, `-TR4050-…`, whose four version characters, as a number that orders them, are in a range. */
  | { readonly kind: 'versions'; readonly client: string; readonly from: number; readonly to: number }

export interface ClientSet {
  readonly size: number
  add(entry: ClientEntry): void
  has(peerId: Uint8Array): boolean
}

/** Version characters in ascending order: clients write 10 as A. */
const characters = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'
const versionMin = 0
const versionMax = characters.length ** 4 - 1

/** chihaya's client ID: six bytes, without a leading `-`; empty if the peer id is too short to have one. */
export function clientId(peerId: string): string {
  const start = peerId.startsWith('-') ? 1 : 0
  return peerId.length < start + 6 ? '' : peerId.slice(start, start + 6)
}

/**
 * Reads an entry of a list.
 * - `AZ3034`: a client ID, as chihaya writes them; a shorter one, `AZ`, is the start of client IDs.
 * - `-AZ30`, or anything longer than six bytes: the start of peer ids.
 * - `TR >= 3.0.0`, also with `>`, `<`, `<=`, or `TR 3.0.0..4.0.5`: versions of an Azureus-style client, ends included.
 *
 * @throws Error saying what is wrong
 */
export function parseClientEntry(text: string): ClientEntry {
  const between = /^([!-~]{2})\s+([0-9A-Za-z.]{1,7}?)\s*\.\.\s*([0-9A-Za-z.]{1,7})$/.exec(text)
  if (between) {
    const [, client = '', from = '', to = ''] = between
    return versions(client, parseVersion(from), parseVersion(to))
  }
  const bound = /^([!-~]{2})\s+(<=?|>=?)\s*(\S.*)$/.exec(text)
  if (bound) {
    const [, client = '', operator, versionText = ''] = bound
    const version = parseVersion(versionText)
    switch (operator) {
      case '>=':
        return versions(client, version, versionMax)
      case '>':
        return versions(client, version + 1, versionMax)
      case '<=':
        return versions(client, versionMin, version)
      default:
        return versions(client, versionMin, version - 1)
    }
  }
  if (!/^[!-~]{1,20}$/.test(text)) {
    throw new Error(
      `Cannot read client ${JSON.stringify(text.slice(0, 64))}: need a client ID (AZ3034), the start of a peer id (-AZ30), or versions (TR >= 3.0.0, TR 3.0.0..4.0.5)`,
    )
  }
  return { kind: text.startsWith('-') || text.length > 6 ? 'peer_id' : 'client', start: text }
}

/**
 * Reads the four version characters of an Azureus-style peer id, as a number that orders them: `4050`, or with dots and
 * without the zeros at the end: `4.0.5`, `3.00`. One character is one number, so 10 is written A, as in the peer id.
 *
 * @throws Error saying what is wrong
 */
export function parseVersion(text: string): number {
  if (!/^[0-9A-Za-z]{4}$|^[0-9A-Za-z](\.[0-9A-Za-z]){0,3}$|^\d\.\d\d$/.test(text)) {
    throw new Error(
      `Cannot read version ${JSON.stringify(text.slice(0, 64))}: need the four characters of the peer id, such as 4050, or 4.0.5 or 3.00; 10 is written A`,
    )
  }
  return versionOf(text.replaceAll('.', '').padEnd(4, '0')) ?? versionMin
}

/** Versions of an Azureus-style client, both ends included. @throws Error saying what is wrong */
export function parseVersionRange(range: {
  readonly client: string
  readonly from?: string | undefined
  readonly to?: string | undefined
}): ClientEntry {
  const { client, from, to } = range
  if (!/^[!-~]{2}$/.test(client)) {
    throw new Error(
      `Cannot read client ${JSON.stringify(client.slice(0, 64))}: need its two characters, such as TR in -TR4050-`,
    )
  }
  if (from === undefined && to === undefined)
    throw new Error(
      `Cannot tell versions of ${client}: need from, to or both; for all of them write -${client}`,
    )
  return versions(
    client,
    from === undefined ? versionMin : parseVersion(from),
    to === undefined ? versionMax : parseVersion(to),
  )
}

export function createClientSet(): ClientSet {
  const clientStarts = createStarts()
  const peerIdStarts = createStarts()
  const ranges = new Map<string, { from: number; to: number }[]>()
  let size = 0
  return {
    get size() {
      return size
    },
    add: (entry) => {
      size++
      switch (entry.kind) {
        case 'client':
          clientStarts.add(entry.start)
          return
        case 'peer_id':
          peerIdStarts.add(entry.start)
          return
        case 'versions':
          ranges.set(entry.client, [...(ranges.get(entry.client) ?? []), entry])
      }
    },
    has: ({ buffer, byteOffset, byteLength }) => {
      const peerId = Buffer.from(buffer, byteOffset, byteLength).toString('latin1')
      if (peerIdStarts.startOf(peerId) || clientStarts.startOf(clientId(peerId))) return true
      if (ranges.size === 0 || !peerId.startsWith('-') || peerId[7] !== '-') return false
      const known = ranges.get(peerId.slice(1, 3))
      if (!known) return false
      const version = versionOf(peerId.slice(3, 7))
      return version !== undefined && known.some(({ from, to }) => version >= from && version <= to)
    },
  }
}

function versions(client: string, from: number, to: number): ClientEntry {
  if (from > to) throw new Error(`Cannot read versions of ${client}: there is none in that range`)
  return { kind: 'versions', client, from, to }
}

/** Texts, asked whether one of them starts another. One look-up for each length in use. */
function createStarts(): { add(text: string): void; startOf(text: string): boolean } {
  const byLength = new Map<number, Set<string>>()
  return {
    add: (text) => {
      const same = byLength.get(text.length) ?? new Set()
      byLength.set(text.length, same.add(text))
    },
    startOf: (text) => {
      for (const [length, texts] of byLength) if (texts.has(text.slice(0, length))) return true
      return false
    },
  }
}

function versionOf(text: string): number | undefined {
  let version = 0
  for (const character of text) {
    const digit = characters.indexOf(character)
    if (digit === -1) return undefined
    version = version * characters.length + digit
  }
  return version
}

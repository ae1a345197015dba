import { ClientError } from '../../../lib/protocol/errors.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import { infoHashFromHex, infoHashToBytes } from '../../../lib/protocol/infohash.ts'
import { parsed } from '../../../lib/runtime/config.ts'
import type { HookDeps, PreHookDefinition } from '../hooks.ts'
import { createByteSet } from './byte-set.ts'
import type { ListHook } from './list-options.ts'
import { listOptions, openList } from './list-options.ts'
import type { EntryList, ListFormat } from './watched-list.ts'

const name = 'torrent approval'
const options = listOptions(parsed(infoHashFromHex), {
  what: 'torrents',
  line: 'one infohash of 40 hex digits',
})

/** Admits announces of approved torrents; and scrapes of them, so that a torrent that is refused cannot be watched either. */
export const torrentApproval = {
  name,
  options,
  async create(options, deps: HookDeps): Promise<ListHook> {
    const list = await openList(options, torrents, deps)
    const check = (infoHash: InfoHash) => {
      if (list.current.has(infoHash) !== (list.kind === 'whitelist')) throw unapproved
    }
    return {
      name,
      list,
      announce: ({ announce }) => {
        check(announce.infoHash)
      },
      scrape: ({ scrape }) => {
        for (const infoHash of scrape.infoHashes) check(infoHash)
      },
      [Symbol.asyncDispose]: () => list[Symbol.asyncDispose](),
    }
  },
} satisfies PreHookDefinition<typeof options>

/** One for all: under a flood, the stack trace of a new one would cost more than the answer. */
const unapproved = new ClientError('unapproved_torrent', 'unapproved torrent')

interface TorrentSet extends EntryList<InfoHash> {
  has(infoHash: InfoHash): boolean
}

const torrents: ListFormat<InfoHash, TorrentSet> = {
  entriesMax: 5_000_000,
  lineBytesMin: 41,
  parse: infoHashFromHex,
  create: (capacity) => {
    const set = createByteSet(20, capacity)
    return {
      get size() {
        return set.size
      },
      add: (infoHash) => {
        set.add(infoHashToBytes(infoHash))
      },
      has: (infoHash) => set.has(infoHashToBytes(infoHash)),
    }
  },
}

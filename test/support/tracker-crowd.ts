// A process that announces many peers at once. In (argv): Crowd as JSON. It ends with code 0 when every announce was answered.
import { createHttpClient } from '../../lib/client/http.ts'
import { createUdpTracker } from '../../lib/client/udp-tracker.ts'
import { parseAnnounceReply, writeAnnounce } from '../../lib/protocol/announce.ts'
import { infoHashFromHex } from '../../lib/protocol/infohash.ts'

export interface Crowd {
  readonly url: string
  /** Peers have the ports from this one on; each is in the swarm of its port modulo the swarms. */
  readonly firstPort: number
  readonly peers: number
  readonly infoHashes: readonly string[]
  /** Clients, each with a socket of its own. */
  readonly clients: number
}

/** What a peer of a crowd is in the end: it starts as a leecher. */
export function fateOf(port: number): 'leecher' | 'seeder' | 'gone' {
  return port % 5 === 0 ? 'gone' : port % 3 === 0 ? 'seeder' : 'leecher'
}

if (import.meta.main) {
  const crowd = JSON.parse(process.argv[2] ?? '') as Crowd
  const { firstPort, peers, infoHashes, clients } = crowd
  await Promise.all(
    Array.from({ length: clients }, async (_, client) => {
      await using tracker = openClient(crowd.url)
      for (let i = client; i < peers; i += clients) {
        const port = firstPort + i
        const fate = fateOf(port)
        const peer = {
          infoHash: infoHashFromHex(infoHashes[port % infoHashes.length] ?? ''),
          peerId: Buffer.from('-RS0001-abcdefghijkl'),
          port,
          uploaded: 0,
          downloaded: 0,
          numwant: 5,
        }
        await tracker.announce({ ...peer, left: 1, event: 'started' })
        if (fate === 'seeder') await tracker.announce({ ...peer, left: 0, event: 'completed' })
        if (fate === 'gone') await tracker.announce({ ...peer, left: 1, event: 'stopped' })
      }
    }),
  )
}

function openClient(url: string) {
  if (url.startsWith('udp:')) return createUdpTracker({ url, firstTimeoutMs: 1000, triesMax: 5 })
  const http = createHttpClient({ baseUrl: url })
  return {
    announce: async (peer: Parameters<typeof writeAnnounce>[0]) => {
      const answer = await http.ok({ path: `/announce?${writeAnnounce(peer)}` })
      return parseAnnounceReply(await answer.bytes())
    },
    [Symbol.asyncDispose]: () => http[Symbol.asyncDispose](),
  }
}

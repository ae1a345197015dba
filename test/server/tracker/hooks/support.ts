import type { TestContext } from 'node:test'
import type { z } from 'zod'
import type { Ip } from '../../../../lib/protocol/address.ts'
import { parseIp } from '../../../../lib/protocol/address.ts'
import { infoHashFromHex } from '../../../../lib/protocol/infohash.ts'
import { silentLog } from '../../../../lib/runtime/log.ts'
import type {
  AnnounceRequest,
  HookDeps,
  PreHookDefinition,
  ScrapeRequest,
} from '../../../../server/tracker/hooks.ts'

export const deps: HookDeps = { log: silentLog(), now: Date.now, random: Math.random }

/** Makes a hook of options as they stand in a configuration. */
export async function createHook<Definition extends PreHookDefinition<z.ZodType>>(
  t: TestContext,
  definition: Definition,
  options: z.input<Definition['options']>,
  withDeps: HookDeps = deps,
): Promise<Awaited<ReturnType<Definition['create']>>> {
  const hook = await definition.create(definition.options.parse(options), withDeps)
  t.after(() => hook[Symbol.asyncDispose]?.())
  return hook as Awaited<ReturnType<Definition['create']>>
}

export function announceOf({
  infoHash = '00'.repeat(20),
  peerId = '-TR4050-abcdefghijkl',
  source = '10.0.0.1',
}: {
  infoHash?: string
  peerId?: string
  source?: string | Ip
}): AnnounceRequest {
  return {
    frontend: 'http',
    announce: {
      infoHash: infoHashFromHex(infoHash),
      peerId: Buffer.from(peerId, 'latin1'),
      port: 6881,
      uploaded: 0,
      downloaded: 0,
      left: 1,
      event: undefined,
      numwant: undefined,
      compact: true,
      ip: undefined,
      ipv4: undefined,
      ipv6: undefined,
      trackerId: undefined,
      jwt: undefined,
      rackswarm: false,
    },
    source: ipOf(source),
    place: undefined,
    trackerId: undefined,
    extraIntervalSeconds: 0,
    extraMinIntervalSeconds: 0,
  }
}

export function scrapeOf({
  infoHashes = ['00'.repeat(20)],
  source = '10.0.0.1',
}: {
  infoHashes?: readonly string[]
  source?: string | Ip
}): ScrapeRequest {
  return {
    frontend: 'http',
    scrape: { infoHashes: infoHashes.map(infoHashFromHex), jwt: undefined },
    source: ipOf(source),
  }
}

/** What a hook says to a request: 'ok', or the message of its refusal. */
export function answer(act: () => unknown): string {
  try {
    act()
    return 'ok'
  } catch (error) {
    if (error instanceof Error && error.name === 'ClientError') return error.message
    throw error
  }
}

export function ipOf(source: string | Ip): Ip {
  if (typeof source !== 'string') return source
  const ip = parseIp(source)
  if (!ip) throw new Error(`${source} is no address`)
  return ip
}

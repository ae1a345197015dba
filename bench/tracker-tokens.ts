import { spawnSync } from 'node:child_process'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { BenchOptions, Benchmark, Side } from './harness.ts'
import { removeAll } from '../test/support/fleet.ts'
import type { LoadOptions, LoadTarget } from './tracker-load.ts'
import { buildGenerator, fillOf, rateFigures, toRateFigures, windowOf } from './tracker-load.ts'
import { createMint } from './tracker-mint.ts'
import { startTrackerServer } from './tracker-server.ts'

const warmTokens = 2000
const unseenTokens = 80_000
const shape = { swarms: warmTokens, peers: 50, numwant: 30, spin: true } as const

/** What it costs that only the approved announce, and what TLS adds. */
export const trackerTokens: Benchmark = {
  name: 'tracker-tokens',
  summary: 'announces with signed tokens: known, unseen, and after a restart; announces over HTTPS',
  figures: [...rateFigures, { name: 'time for all', unit: 's' }],
  ignoresSize: true,
  prepare,
}

async function prepare(stack: AsyncDisposableStack, { directory }: BenchOptions): Promise<Side[]> {
  const generator = buildGenerator(directory)
  const at = (name: string) => join(directory, name)
  const mint = await createMint(at('keys.json'))
  const tokens = at('tokens')
  const unseen = at('unseen')
  process.stderr.write(`Signing ${warmTokens + unseenTokens} tokens\n`)
  await mint.write(tokens, warmTokens)
  await mint.write(unseen, unseenTokens)
  const { keysFile } = mint
  const udpHost = '127.0.0.1'
  const off = stack.use(await startTrackerServer({ name: 'tokens off', directory: at('off'), udpHost }))
  const on = stack.use(
    await startTrackerServer({ name: 'tokens on', directory: at('on'), udpHost, keysFile }),
  )
  const secure = stack.use(
    await startTrackerServer({ name: 'HTTPS', directory: at('tls'), tls: makeCertificate(directory) }),
  )
  const fill = { ...shape, protocol: 'http', fill: true, seconds: 0 } as const
  await generator.load(off.http, fill)
  await generator.load(secure.http, { ...fill, tls: true })
  await generator.load(on.http, { ...fill, tokens })

  const rate = (
    target: LoadTarget,
    kind: string,
    settings: string,
    own: Pick<LoadOptions, 'protocol' | 'tokens' | 'tls' | 'newConnections'>,
  ): Side => ({
    name: `${target.name}, ${kind}`,
    settings,
    run: async () => toRateFigures(windowOf(await generator.load(target, { ...shape, ...own }))),
  })
  const cold = coldSides(directory, keysFile, async (target, tokensFile, saveTickets) => {
    const result = await generator.load(target, {
      protocol: 'http',
      tokens: tokensFile,
      peers: 1,
      fill: true,
      seconds: 0,
      ...(saveTickets === undefined ? {} : { saveTickets }),
    })
    const stretch = fillOf(result)
    if (stretch.announces !== unseenTokens)
      throw new Error(`${stretch.announces} of ${unseenTokens} announces were answered`)
    return { ...toRateFigures(stretch), 'time for all': stretch.seconds }
  })
  return [
    rate(
      off.http,
      'HTTP keep-alive',
      `${warmTokens} swarms of ${shape.peers} peers, 30 peers a reply, approval: none, and no token in the request; server on one core (taskset), generator on the other; 64 connections, 2 s of warm-up, 4 s measured`,
      { protocol: 'http' },
    ),
    rate(
      on.http,
      'HTTP keep-alive',
      `approval: token; a token (ES256) for each swarm in \`jwt\`, all of them seen before; else the same`,
      { protocol: 'http', tokens },
    ),
    rate(off.udp, 'UDP', 'approval: none, no token; the same swarms; 128 announces under way', {
      protocol: 'udp',
    }),
    rate(on.udp, 'UDP', 'approval: token; the same tokens as URLData (BEP 41)', { protocol: 'udp', tokens }),
    ...cold(unseen),
    rate(
      secure.http,
      'keep-alive',
      'TLS 1.3, P-256 certificate; approval: none; the same swarms and load as HTTP',
      { protocol: 'http', tls: true },
    ),
    rate(secure.http, 'new connection each', 'the same, a full handshake for each announce', {
      protocol: 'http',
      tls: true,
      newConnections: true,
    }),
  ]
}

/** The second side goes on where the first has ended: the same server, started again, and the tickets of its replies. */
function coldSides(
  directory: string,
  keysFile: string,
  announceAll: (target: LoadTarget, tokens: string, saveTickets?: string) => Promise<Record<string, number>>,
): (unseen: string) => Side[] {
  const tickets = join(directory, 'tickets')
  const settings = {
    name: 'rackswarm',
    directory: join(directory, 'cold'),
    keysFile,
    pinned: false,
  } as const
  return (unseen) => [
    {
      name: `${unseenTokens} unseen tokens`,
      settings:
        'a fresh server, not held on a core; HTTP keep-alive, 64 connections; from the first announce to the last reply',
      run: async () => {
        await removeAll(settings.directory)
        await using server = await startTrackerServer(settings)
        return await announceAll(server.http, unseen, tickets)
      },
    },
    {
      name: 'the same after a restart, with tickets',
      settings: 'the same tokens, each with the `tracker id` of the reply before as `trackerid`',
      run: async () => {
        const lines = (await readFile(tickets, 'utf8')).trim().split('\n')
        const without = lines.filter((line) => line.split('\t').length < 3).length
        if (without > 0)
          throw new Error(`Cannot measure tickets: ${without} of ${lines.length} replies had no tracker id`)
        await using server = await startTrackerServer(settings)
        return await announceAll(server.http, tickets)
      },
    },
  ]
}

function makeCertificate(directory: string): { cert: string; key: string } {
  const files = { cert: join(directory, 'cert.pem'), key: join(directory, 'key.pem') }
  const { status, stderr } = spawnSync(
    'openssl',
    [
      ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'],
      ...['-subj', '/CN=localhost', '-keyout', files.key, '-out', files.cert],
    ],
    { encoding: 'utf8' },
  )
  if (status !== 0) throw new Error(`Cannot make a certificate: ${stderr}`)
  return files
}

import { once } from 'node:events'
import { fastify } from 'fastify'
import type { AgentStatus, FetchEvent, RefusedRelease, Transfer, TransferList } from '../lib/client/api.ts'
import { FetchRequest } from '../lib/client/api.ts'
import { RequestError } from '../lib/client/http.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import type { Reference } from '../lib/protocol/reference.ts'
import { parseReference } from '../lib/protocol/reference.ts'
import type { Logger } from '../lib/runtime/log.ts'
import { WrongDigestError } from './blob-fetcher.ts'
import { prepareSocketPath, protectSocket } from './control-socket.ts'
import type { Pins } from './pins.ts'
import type { ReleaseFetcher } from './release-fetcher.ts'
import { filesOf } from './release-fetcher.ts'
import { UnverifiedError } from './release-verifier.ts'
import { keyOf } from './releases.ts'

export interface ControlDeps {
  status(): AgentStatus | Promise<AgentStatus>
  transfers(): Transfer[]
  fetcher: Pick<ReleaseFetcher, 'fetch' | 'held' | 'refused'>
  /** Resolves when the host may ask the server for things. */
  ready(signal: AbortSignal): Promise<void>
  pins: Pins
  log: Logger
}

/** A person watches: this often is smooth, and little. */
const progressMs = 250
/** A fetch says that it is alive even when nothing changes. */
const progressSilenceMs = 10_000
/** How long a fetch waits for this host to be enrolled. */
const enrolmentWaitMs = 30_000
/** Open fetches of people and scripts. */
const fetchesMax = 64
/** An answer is read by a person: 50 × 100 peers of 400 bytes are 2 MB at most. */
const transfersMax = 50
const transferPeersMax = 100

/** The control API on its unix socket. Who may connect is the file system's decision. */
export async function startControlApi(
  options: { path: string; group: string },
  deps: ControlDeps,
): Promise<AsyncDisposable> {
  const { log } = deps
  await prepareSocketPath(options.path, options.group)
  const app = fastify({
    logger: false,
    bodyLimit: 64 * 1024,
    routerOptions: { maxParamLength: 2048 },
    forceCloseConnections: true,
  })
  let fetches = 0

  app.setErrorHandler((error: unknown, _request, reply) => {
    const described = describe(error)
    if (described.status === 500) log.error({ err: error }, 'control request failed')
    return reply.code(described.status).send({ error: described.error })
  })
  app.setNotFoundHandler((_request, reply) =>
    reply.code(404).send({ error: { code: 'NOT_FOUND', message: 'There is no such call' } }),
  )
  app.get('/v1/status', async () => deps.status())
  app.get('/v1/transfers', () => bounded(deps.transfers(), deps.fetcher.refused()))

  app.put<{ Params: { reference: string } }>('/v1/pins/:reference', async (request, reply) => {
    await deps.pins.add(keyOf(parseReference(request.params.reference)))
    return reply.code(204).send()
  })
  app.delete<{ Params: { reference: string } }>('/v1/pins/:reference', async (request, reply) => {
    await deps.pins.remove(keyOf(parseReference(request.params.reference)))
    return reply.code(204).send()
  })

  app.post('/v1/fetch', async (request, reply) => {
    const body = FetchRequest.safeParse(request.body)
    if (!body.success)
      throw new ClientError(
        'BAD_REQUEST',
        'Cannot read the request: need {"reference": "NAME[:TAG][@DIGEST]"}',
      )
    const reference = parseReference(body.data.reference)
    if (fetches >= fetchesMax)
      throw new ClientError('TOO_MANY', `Cannot fetch: ${fetchesMax} fetches are open already`)
    const gone = new AbortController()
    reply.hijack()
    const { raw } = reply
    raw.on('close', () => {
      gone.abort(new Error('the caller has gone'))
    })
    raw.on('error', () => undefined)
    raw.writeHead(200, { 'content-type': 'application/x-ndjson' })
    raw.flushHeaders()
    fetches++
    try {
      await tellFetch(reference, gone.signal, async (event) => {
        if (!raw.write(`${JSON.stringify(event)}\n`) && !raw.destroyed) {
          await Promise.race([once(raw, 'drain'), once(raw, 'close')])
        }
      })
    } finally {
      fetches--
      raw.end()
    }
  })

  const tellFetch = async (
    reference: Reference,
    signal: AbortSignal,
    tell: (event: FetchEvent) => Promise<void>,
  ) => {
    const key = keyOf(reference)
    const done = (async () => {
      const late = AbortSignal.timeout(enrolmentWaitMs)
      await deps.ready(AbortSignal.any([signal, late])).catch(() => {
        throw new ClientError(
          'NOT_ENROLLED',
          'Cannot fetch: this host is not enrolled yet; `deployctl status` and the log of the agent say why',
        )
      })
      return deps.fetcher.fetch(reference, reference.digest, { stubborn: false, signal })
    })()
    done.catch(() => undefined)
    let last = ''
    let toldAt = 0
    const outcome = done.then(
      () => true,
      () => true,
    )
    for (;;) {
      const ended = await Promise.race([
        outcome,
        new Promise<false>((resolve) => setTimeout(resolve, progressMs, false)),
      ])
      if (ended || signal.aborted) break
      const held = deps.fetcher.held(key)
      if (!held) continue
      const now = JSON.stringify({ ...held, tookMs: 0 })
      if (now === last && performance.now() - toldAt < progressSilenceMs) continue
      last = now
      toldAt = performance.now()
      await tell({ event: 'progress', held })
    }
    if (signal.aborted) return
    try {
      const release = await done
      const held = deps.fetcher.held(key)
      if (!held) throw new Error('the release is gone again')
      await tell({ event: 'done', held, files: filesOf(release) })
    } catch (error) {
      await tell({ event: 'error', error: describe(error).error })
    }
  }

  await app.listen({ path: options.path })
  await protectSocket(options.path, options.group)
  return {
    [Symbol.asyncDispose]: async () => {
      await app.close()
    },
  }
}

const stateOrder = { fetching: 0, waiting: 1, seeding: 2 }

/** What matters most: fetches, then the busiest seeds; of each the busiest peers. */
function bounded(all: readonly Transfer[], refused: readonly RefusedRelease[]): TransferList {
  const transfers = all
    .toSorted((a, b) => stateOrder[a.state] - stateOrder[b.state] || byRate(a, b))
    .slice(0, transfersMax)
    .map((transfer) => ({
      ...transfer,
      peers: transfer.peers.toSorted(byRate).slice(0, transferPeersMax),
    }))
  return {
    transferCount: all.length,
    transfers,
    ...(refused.length > 0 && { refused: refused.slice(0, transfersMax) }),
  }
}

type Rated = Pick<Transfer, 'downloadRate' | 'uploadRate'>

function byRate(a: Rated, b: Rated): number {
  return b.downloadRate + b.uploadRate - (a.downloadRate + a.uploadRate)
}

function describe(error: unknown): {
  status: number
  error: { code: string; message: string; hint?: string }
} {
  if (error instanceof WrongDigestError)
    return { status: 502, error: { code: 'DIGEST_MISMATCH', message: error.message } }
  if (error instanceof UnverifiedError)
    return {
      status: 403,
      error: { code: 'VERIFICATION_FAILED', message: error.message, hint: error.hint },
    }
  if (error instanceof ClientError)
    return { status: 400, error: { code: error.code, message: error.message } }
  if (error instanceof RequestError) {
    const { status, code, message, hint } = error
    return { status, error: { code, message, ...(hint === undefined ? {} : { hint }) } }
  }
  if (
    error instanceof Error &&
    'statusCode' in error &&
    typeof error.statusCode === 'number' &&
    error.statusCode < 500
  )
    return { status: error.statusCode, error: { code: 'BAD_REQUEST', message: error.message } }
  return {
    status: 500,
    error: {
      code: 'FAILED',
      message: error instanceof Error ? error.message : String(error),
      hint: 'The log of the agent says more.',
    },
  }
}

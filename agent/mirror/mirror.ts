import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { isLoopback, parseIp } from '../../lib/protocol/address.ts'
import { answerRange, contentRange, etagOf, isUnchanged } from '../../lib/protocol/http-range.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { BlobReader, BlobReaders } from './blob-reader.ts'
import type { Catalogue } from './catalogue.ts'
import { MirrorError, cannotHelp } from './mirror-error.ts'
import type { MirrorTarget } from './mirror-target.ts'
import { parseMirrorPath } from './mirror-target.ts'

/** `not_found` is what sends clients on to the registry; `cut` a reply that we could not end; `left` one that the client did not wait for. */
export type MirrorOutcome = 'ok' | 'not_found' | 'refused' | 'busy' | 'cut' | 'left' | 'failed'

export interface MirrorObserver {
  begun(): void
  ended(kind: MirrorTarget['kind'] | 'other', outcome: MirrorOutcome): void
  sent(from: 'manifest' | 'cache' | 'swarm', bytes: number): void
}

export interface MirrorDeps {
  catalogue: Catalogue
  readers: BlobReaders
  log: Logger
  observe: MirrorObserver
}

export interface Mirror extends AsyncDisposable {
  readonly url: string
}

/** Requests under way; a client that has more gets 503, and goes on to the registry. */
const requestsMax = 256
const connectionsMax = 512
/** A client that takes nothing for this long is cut off. */
const clientSilenceMs = 60_000
/** Of each reply there are two: one is read while the other is sent. */
const chunkBytes = 256 * 1024

/**
 * A registry for the clients of this host alone (OCI distribution-spec 1.1, "Pull"): what they ask for comes from the server and the swarm. It changes
 * nothing, and has no credentials of its own clients: who can connect may pull what the host may.
 *
 * @param registries names under which clients know the registry (`ns` in the query)
 */
export async function startMirror(
  options: { addr: { host: string; port: number }; registries: readonly string[] },
  deps: MirrorDeps,
): Promise<Mirror> {
  const { log, observe } = deps
  const registries = new Set(options.registries)
  let requests = 0

  const handle = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const gone = new AbortController()
    response.once('close', () => {
      gone.abort(new Error('the client has gone'))
    })
    response.on('error', () => undefined)
    const [path = '', query = ''] = (request.url ?? '').split('?', 2)
    const target = parseMirrorPath(path)
    let outcome: MirrorOutcome = 'ok'
    requests++
    observe.begun()
    try {
      if (requests > requestsMax)
        throw new MirrorError(503, 'TOOMANYREQUESTS', `${requestsMax} requests are under way already`)
      checkRequest(request)
      if (target === undefined) throw new MirrorError(404, 'UNSUPPORTED', 'The mirror has no such endpoint')
      const ns = namespaceOf(query)
      if (ns !== undefined) response.setHeader('oci-namespace', ns)
      await answer(target, { ...deps, request, response, signal: gone.signal })
    } catch (error) {
      outcome = outcomeOf(error, response, gone.signal)
      if (outcome === 'failed' || outcome === 'cut')
        log.warn({ err: error, path: path.slice(0, 300) }, 'the mirror could not serve a request')
      else if (outcome !== 'left')
        log.debug(
          { path: path.slice(0, 300), reason: (error as Error).message },
          'the mirror sent a client on',
        )
      if (response.headersSent) response.destroy()
      else refuse(response, error)
    } finally {
      requests--
      observe.ended(target?.kind ?? 'other', outcome)
    }
  }

  /** @returns the registry that the client says it means (distribution-spec, "Registry Proxying") */
  const namespaceOf = (query: string): string | undefined => {
    const ns = new URLSearchParams(query).get('ns') ?? undefined
    if (ns === undefined || registries.has(ns)) return ns
    throw new MirrorError(
      404,
      'NAME_UNKNOWN',
      `The mirror does not serve ${JSON.stringify(ns.slice(0, 100))}: mirror.registries in agent.yaml has ${[...registries].join(', ')}`,
    )
  }

  const server = createServer((request, response) => {
    void handle(request, response)
  })
  server.maxConnections = connectionsMax
  server.headersTimeout = 10_000
  // No request has a body that is read.
  server.requestTimeout = 10_000
  server.keepAliveTimeout = 30_000
  const { host, port } = options.addr
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(port, host, () => {
      server.off('error', reject)
      resolve()
    })
  })
  const shown = host.includes(':') ? `[${host}]` : host
  return {
    url: `http://${shown}:${(server.address() as AddressInfo).port}`,
    [Symbol.asyncDispose]: async () => {
      const closed = new Promise((resolve) => server.close(resolve))
      server.closeAllConnections()
      await closed
    },
  }
}

interface Exchange extends MirrorDeps {
  readonly request: IncomingMessage
  readonly response: ServerResponse
  /** Aborted when the client has gone. */
  readonly signal: AbortSignal
}

function checkRequest({ method, headers }: IncomingMessage): void {
  // A page in a browser of this host may have a name of its own point here.
  if (!isLocalHost(headers.host ?? ''))
    throw new MirrorError(404, 'UNSUPPORTED', 'The mirror answers to loopback addresses alone')
  if (method !== 'GET' && method !== 'HEAD')
    throw new MirrorError(405, 'UNSUPPORTED', 'The mirror is for pulls alone: push to the registry', {
      headers: { allow: 'GET, HEAD' },
    })
}

async function answer(target: MirrorTarget, exchange: Exchange): Promise<void> {
  switch (target.kind) {
    case 'base':
      exchange.response
        .writeHead(200, {
          'docker-distribution-api-version': 'registry/2.0',
          'content-type': 'application/json',
          'content-length': 2,
        })
        .end('{}')
      return
    case 'manifest':
      return answerManifest(target, exchange)
    case 'blob':
      return answerBlob(target, exchange)
  }
}

async function answerManifest(
  { repository, reference }: Extract<MirrorTarget, { kind: 'manifest' }>,
  { catalogue, request, response, signal, observe }: Exchange,
): Promise<void> {
  const { bytes, digest, mediaType } = await catalogue.manifest(repository, reference, signal)
  const etag = etagOf(digest)
  const headers = { 'docker-content-digest': digest, etag }
  if (isUnchanged(request.headers, etag)) {
    response.writeHead(304, headers).end()
    return
  }
  response.writeHead(200, {
    ...headers,
    // Clients compare it as a whole.
    'content-type': mediaType.split(';')[0]?.trim() ?? '',
    'content-length': bytes.length,
  })
  response.end(request.method === 'HEAD' ? undefined : bytes)
  if (request.method === 'GET') observe.sent('manifest', bytes.length)
}

async function answerBlob(
  { repository, digest }: Extract<MirrorTarget, { kind: 'blob' }>,
  exchange: Exchange,
): Promise<void> {
  const { catalogue, readers, request, response, signal } = exchange
  const sizeBytes = await catalogue.blobSize(repository, digest, signal)
  const etag = etagOf(digest)
  const common = { 'docker-content-digest': digest, 'accept-ranges': 'bytes', etag }
  const wanted = answerRange(request.headers, etag, sizeBytes)
  if (wanted.status === 304) {
    response.writeHead(304, common).end()
    return
  }
  if (wanted.status === 416) {
    throw new MirrorError(416, 'SIZE_INVALID', `Cannot serve the range: the blob has ${sizeBytes} bytes`, {
      headers: { 'content-range': contentRange(undefined, sizeBytes) },
    })
  }
  const { status, start, end } = wanted
  const head = () => {
    response.writeHead(status, {
      ...common,
      'content-type': 'application/octet-stream',
      'content-length': end - start,
      ...(status === 206 && { 'content-range': contentRange(wanted, sizeBytes) }),
    })
  }
  if (request.method === 'HEAD' || start === end) {
    head()
    response.end()
    return
  }
  await using reader = await readers.open({ repository, digest, sizeBytes }, signal).catch(unhelpful)
  await sendBytes(reader, { start, end, head }, exchange)
}

/** The head is sent once the first byte is there: until then the client can be sent on to the registry. */
async function sendBytes(
  reader: BlobReader,
  { start, end, head }: { start: number; end: number; head: () => void },
  { response, observe }: Exchange,
): Promise<void> {
  let [filling, sending] = [Buffer.allocUnsafeSlow(chunkBytes), Buffer.allocUnsafeSlow(chunkBytes)]
  let position = start
  let filled = await reader.read(filling, position, end).catch(unhelpful)
  head()
  for (;;) {
    ;[filling, sending] = [sending, filling]
    const sent = write(response, sending.subarray(0, filled))
    position += filled
    observe.sent(reader.from, filled)
    if (position === end) {
      await sent
      break
    }
    ;[filled] = await Promise.all([reader.read(filling, position, end), sent])
  }
  response.end()
}

/** Resolves when the bytes have left this process, and the buffer may be used again. */
async function write(response: ServerResponse, bytes: Uint8Array): Promise<void> {
  const sent = Promise.withResolvers<undefined>()
  const timer = setTimeout(() => response.destroy(), clientSilenceMs)
  response.write(bytes, (error) => {
    if (error) sent.reject(error)
    else sent.resolve(undefined)
  })
  try {
    await sent.promise
  } finally {
    clearTimeout(timer)
  }
}

/** Whatever keeps a blob from coming: the registry may do better. */
function unhelpful(error: unknown): never {
  if (error instanceof MirrorError) throw error
  throw cannotHelp('BLOB_UNKNOWN', `The mirror cannot get the blob: ${(error as Error).message}`, error)
}

function outcomeOf(error: unknown, response: ServerResponse, signal: AbortSignal): MirrorOutcome {
  if (signal.aborted) return 'left'
  if (response.headersSent) return 'cut'
  if (!(error instanceof MirrorError)) return 'failed'
  if (error.status === 503) return 'busy'
  return error.code === 'BLOB_UNKNOWN' || error.code === 'MANIFEST_UNKNOWN' ? 'not_found' : 'refused'
}

function refuse(response: ServerResponse, error: unknown): void {
  const told =
    error instanceof MirrorError ? error : new MirrorError(500, 'UNKNOWN', 'The log of the agent says more')
  const body = JSON.stringify({ errors: [{ code: told.code, message: told.message }] })
  response
    .writeHead(told.status, {
      ...told.headers,
      'content-type': 'application/json',
      'content-length': Buffer.byteLength(body),
      // The body of a push would have to be read to its end.
      ...(told.status === 405 && { connection: 'close' }),
    })
    .end(body)
}

/** Whether a Host header names this host by a loopback address. */
function isLocalHost(header: string): boolean {
  const name = header.replace(/:\d*$/, '').replace(/^\[(.*)\]$/, '$1')
  const ip = parseIp(name)
  return name === 'localhost' || (ip !== undefined && isLoopback(ip))
}

import type { ServerResponse } from 'node:http'
import type { FastifyReply } from 'fastify'
import type { Logger } from '../../../lib/runtime/log.ts'

/** What goes with the bytes, and not with an error in their place. */
const contentHeaders = ['content-length', 'content-range', 'content-type', 'etag', 'docker-content-digest']

/**
 * Sends the chunks one after the other, each once the one before has left: a chunk need not be good for longer. Stops reading when the client
 * goes away.
 *
 * @throws what the first chunk throws; later the connection is cut, so that nobody takes a part for the whole
 */
export async function sendBytes(
  reply: FastifyReply,
  read: (signal: AbortSignal) => AsyncIterable<Uint8Array>,
  log: Logger,
): Promise<FastifyReply> {
  const { raw } = reply
  if (raw.destroyed) return reply.hijack()
  const gone = new AbortController()
  raw.once('close', () => {
    gone.abort()
  })
  const chunks = read(gone.signal)[Symbol.asyncIterator]()
  let next = await chunks.next().catch((error: unknown) => {
    for (const name of contentHeaders) reply.removeHeader(name)
    throw error
  })
  if (next.done === true) return reply.send()
  reply.hijack()
  const send = async () => {
    raw.statusCode = reply.statusCode
    for (const [name, value] of Object.entries(reply.getHeaders()))
      if (value !== undefined) raw.setHeader(name, value)
    for (; next.done !== true; next = await chunks.next()) if (!(await leaves(raw, next.value))) break
    await chunks.return?.()
    raw.end()
  }
  send().catch((error: unknown) => {
    if (!gone.signal.aborted)
      log.error({ err: error, route: reply.request.routeOptions.url }, 'a reply broke off')
    raw.destroy()
  })
  return reply
}

/** Resolves when the chunk is with the kernel; to false where the client has gone. */
async function leaves(raw: ServerResponse, chunk: Uint8Array): Promise<boolean> {
  return new Promise((resolve) => {
    if (raw.destroyed) {
      resolve(false)
      return
    }
    const gone = () => {
      resolve(false)
    }
    raw.once('close', gone)
    raw.write(chunk, (error) => {
      raw.off('close', gone)
      resolve(error === undefined || error === null)
    })
  })
}

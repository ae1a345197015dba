import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'

/** Streams to the client, and stops reading when it goes away. */
export function sendBytes(
  reply: FastifyReply,
  read: (signal: AbortSignal) => AsyncIterable<Uint8Array>,
): FastifyReply {
  const gone = new AbortController()
  reply.raw.once('close', () => {
    gone.abort()
  })
  if (reply.raw.destroyed) return reply.hijack()
  return reply.send(Readable.from(read(gone.signal), { objectMode: false }))
}

import { once } from 'node:events'
import type { Socket } from 'node:net'
import { connect } from 'node:net'
import type { TestContext } from 'node:test'

export interface Reply {
  readonly status: number
  readonly headers: ReadonlyMap<string, string>
  readonly body: string
}

/** A client that says exactly what it is told to, and hears what it is told. */
export interface RawClient {
  readonly socket: Socket
  send(text: string | Uint8Array): void
  /** The next reply, whole. Rejects when the connection ends before. */
  reply(): Promise<Reply>
  /** Resolves once the other side has ended or reset, with what came and was not taken by `reply`. */
  ended(): Promise<string>
}

export async function rawClient(
  t: TestContext,
  port: number,
  options: { allowHalfOpen?: boolean; host?: string; localAddress?: string } = {},
): Promise<RawClient> {
  const socket = connect({ port, host: '127.0.0.1', noDelay: true, ...options })
  t.after(() => socket.destroy())
  socket.on('error', () => undefined)
  await once(socket, 'connect')
  return rawClientOn(socket)
}

/** The same on a socket that is there, such as a TLS one. */
export function rawClientOn(socket: Socket): RawClient {
  let received = ''
  let over = false
  let wake: () => void = () => undefined
  socket.on('error', () => undefined)
  socket.on('data', (chunk: Buffer) => {
    received += chunk.toString('latin1')
    wake()
  })
  const end = () => {
    over = true
    wake()
  }
  socket.once('end', end).once('close', end)
  const change = () =>
    new Promise<void>((resolve) => {
      wake = resolve
    })
  return {
    socket,
    send: (text) => socket.write(typeof text === 'string' ? Buffer.from(text, 'latin1') : text),
    reply: async () => {
      for (;;) {
        const [reply, length] = parseReply(received) ?? []
        if (reply !== undefined) {
          received = received.slice(length)
          return reply
        }
        if (over) throw new Error(`The connection ended, after ${JSON.stringify(received)}`)
        await change()
      }
    },
    ended: async () => {
      while (!over) await change()
      return received
    },
  }
}

/**
 * All replies in what one connection received; throws if something else is there too.
 *
 * @param methods of the requests, in order: the reply to HEAD has no body
 */
export function parseReplies(text: string, methods: readonly string[] = []): Reply[] {
  const replies: Reply[] = []
  for (let rest = text; rest !== '';) {
    const [reply, length] = parseReply(rest, methods[replies.length]) ?? []
    if (reply === undefined) throw new Error(`Cannot read a reply in ${JSON.stringify(rest)}`)
    replies.push(reply)
    rest = rest.slice(length)
  }
  return replies
}

function parseReply(text: string, method = 'GET'): [Reply, number] | undefined {
  const end = text.indexOf('\r\n\r\n')
  if (end === -1) return undefined
  const [statusLine = '', ...lines] = text.slice(0, end).split('\r\n')
  const headers = new Map(lines.map((line) => line.split(': ', 2) as [string, string]))
  const length = end + 4 + (method === 'HEAD' ? 0 : Number(headers.get('content-length') ?? 0))
  if (text.length < length) return undefined
  const status = Number(/^HTTP\/1\.1 (\d{3}) /.exec(statusLine)?.[1])
  if (Number.isNaN(status) || Number.isNaN(length))
    throw new Error(`Cannot read a reply in ${JSON.stringify(text.slice(0, 1000))}`)
  return [{ status, headers, body: text.slice(end + 4, length) }, length]
}

import type { Socket } from 'node:net'
import type { Ip } from '../../lib/protocol/address.ts'
import { socketAddress } from '../../lib/protocol/address.ts'
import { writeFailure } from '../../lib/protocol/announce.ts'
import type { Cidr } from '../../lib/protocol/cidr.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { Logger } from '../../lib/runtime/log.ts'
import type { ForwardedHeader } from './client-address.ts'
import { clientAddress, isTrusted } from './client-address.ts'
import type { HttpRequest } from './http-reader.ts'
import { HttpReader } from './http-reader.ts'
import type { TextAnswer } from './http-reply.ts'
import { writeReply } from './http-reply.ts'
import type { MatchRoute } from './http-routes.ts'
import type { Tracker } from './tracker.ts'
import type { Turns } from './http-turns.ts'

/** What answers: the tracker. What a request is refused for is in the bytes. */
export type TrackerHandlers = Pick<Tracker, 'announce' | 'scrape'>

/** What all connections of a listener share; its fields change while connections live. */
export interface ConnectionContext {
  readonly tracker: TrackerHandlers
  readonly log: Logger
  readonly match: MatchRoute
  readonly trustedProxies: readonly Cidr[]
  readonly forwardedHeader: ForwardedHeader
  readonly headTimeoutMs: number
  readonly idleTimeoutMs: number
  readonly turns: Turns
  /** Milliseconds of a clock that only goes forward. */
  readonly now: () => number
  /** The listener ends: every reply is the last one on its connection. */
  readonly closing: boolean
  /** The same, but new connections are still taken. */
  readonly leaving: boolean
}

/** An announce with the largest token we accept has some 5,000 characters; a scrape of 50 infohashes 3,500. */
export const queryCharactersMax = 8192
/** Requests of one connection that are answered before those of all others that wait. */
const requestsPerTurn = 4
/** Replies to pipelined requests that go out as one; then the socket says whether the client reads them. */
const batchBytesMax = 64 * 1024
/** How long the tracker may take for one reply; its hooks and its store have shorter deadlines of their own. */
const replyTimeoutMs = 60_000
/** How long a connection that was taken just before the listener ends may take to send its request. */
const firstRequestMs = 1_000
/**
 * How long what still comes behind the last reply is dropped. A connection that is closed with bytes unread is reset, and a
 * reset throws away the reply that the client has not read yet (RFC 9112 section 9.6).
 */
const lingerMs = 5_000

/**
 * `idle`: between requests. `reading`: a head is awaited, or part of one is there. `replying`: the tracker works. `draining`: the
 * client does not read its replies. `resting`: others have their turn. `ending`: the last reply is written, the client's end is awaited.
 */
type State = 'idle' | 'reading' | 'replying' | 'draining' | 'resting' | 'ending'

/**
 * One connection: reads requests, has them answered in order, and ends. While it waits for the tracker or for the client to read,
 * it holds the chunk it is at and the next one (64 KiB each), and leaves the rest to the kernel.
 */
export class HttpConnection {
  readonly #context: ConnectionContext
  readonly #socket: Socket
  readonly #reader = new HttpReader()
  /** The client's address as the PROXY protocol or the socket says; the socket is asked with the first request. */
  #peer: Ip | undefined
  #state: State = 'reading'
  #deadline: number
  /** Requests taken since it last let others have their turn. */
  #taken = 0
  /** The client sends no more; it may still read. */
  #halfClosed = false

  constructor(
    context: ConnectionContext,
    socket: Socket,
    peer: Ip | undefined,
    closed: (connection: HttpConnection) => void,
  ) {
    this.#context = context
    this.#socket = socket
    this.#peer = peer
    this.#deadline = context.now() + context.headTimeoutMs
    socket.on('data', (chunk: Buffer) => {
      this.received(chunk)
    })
    socket.on('end', () => {
      this.#ended()
    })
    // A reset is a way of leaving; 'close' follows.
    socket.on('error', ignore)
    socket.on('close', () => {
      closed(this)
    })
  }

  /** Takes bytes; those that came behind a PROXY protocol header are passed by hand. */
  received(chunk: Buffer): void {
    if (this.#state === 'ending') return
    this.#reader.push(chunk)
    if (this.#state === 'replying' || this.#state === 'draining' || this.#state === 'resting')
      this.#socket.pause()
    else this.#guarded(() => this.#advance())
  }

  /** Ends what has waited for too long. */
  sweep(nowMs: number): void {
    if (this.#deadline > nowMs) return
    if (this.#state === 'reading' && !this.#reader.blank) {
      this.#end([refusal(408, 'its head took too long')])
    } else if (this.#state === 'reading' || this.#state === 'idle') {
      this.#socket.destroySoon()
    } else {
      this.#socket.destroy()
    }
  }

  /**
   * The listener ends: closes where no request is under way; else the next reply is the last. The first request of a connection is taken to
   * be under way for a while. Of an idle one only our half is closed: a request that crosses the close finds no answer, but no reset either, and
   * its client asks again elsewhere.
   */
  retire(): void {
    if (this.#state === 'idle') this.#end([])
    else if (this.#state === 'reading' && this.#reader.blank)
      this.#deadline = Math.min(this.#deadline, this.#context.now() + firstRequestMs)
  }

  destroy(): void {
    this.#socket.destroy()
  }

  /** What goes wrong costs this connection, not the process. */
  #guarded(step: () => void): void {
    try {
      step()
    } catch (error) {
      this.#context.log.error({ err: error }, 'connection failed')
      this.#socket.destroy()
    }
  }

  /** Answers the requests that are there, until one has to wait for the tracker or the client should read first. */
  #advance(): void {
    const context = this.#context
    const peer = (this.#peer ??= socketAddress(this.#socket.remoteAddress))
    if (peer === undefined) {
      // Closed while its bytes waited; an answer goes nowhere.
      this.#socket.destroy()
      return
    }
    const trusted = context.trustedProxies.length > 0 && isTrusted(peer, context.trustedProxies)
    let replies: Buffer[] = []
    let bytes = 0
    for (;;) {
      // Whoever has sent gets one answer in this turn; the look at the clock is for those that pipeline.
      if (
        (this.#taken >= requestsPerTurn || (replies.length > 0 && context.turns.over)) &&
        this.#reader.held > 0
      ) {
        if (replies.length === 0 || this.#write(replies)) this.#rest()
        return
      }
      const request = this.#reader.next(trusted ? context.forwardedHeader : undefined)
      if (request === undefined) {
        if (replies.length === 0 || this.#write(replies)) this.#await(replies.length > 0)
        return
      }
      if (request.kind === 'refusal') {
        replies.push(refusal(request.status, request.message))
        this.#end(replies)
        return
      }
      this.#taken++
      const answer = this.#ask(request, peer)
      if (answer instanceof Promise) {
        if (replies.length > 0) this.#send(replies)
        this.#awaitAnswer(request, answer)
        return
      }
      const closing = !request.keepAlive || context.closing || context.leaving
      const reply = writeReply(answer, request, closing)
      replies.push(reply)
      if (closing) {
        this.#end(replies, { asked: !request.keepAlive })
        return
      }
      bytes += reply.length
      if (bytes >= batchBytesMax) {
        if (!this.#write(replies)) return
        replies = []
        bytes = 0
      }
    }
  }

  #ask(request: HttpRequest, peer: Ip): Buffer | TextAnswer | Promise<Buffer | TextAnswer> {
    const { match, tracker, trustedProxies, forwardedHeader } = this.#context
    const action = match(request.path)
    if (action === undefined) return { status: 404, text: 'there is nothing here' }
    if (request.method !== 'GET') return { status: 405, text: `${request.path} takes GET` }
    if (request.query.length > queryCharactersMax) return writeFailure('query too long')
    try {
      const source =
        request.forwarded === undefined
          ? peer
          : clientAddress(peer, request.forwarded, forwardedHeader, trustedProxies)
      const body = tracker[action](request.query, source)
      return body instanceof Promise ? body.catch((error: unknown) => this.#failed(error)) : body
    } catch (error) {
      return this.#failed(error)
    }
  }

  #failed(error: unknown): TextAnswer {
    if (error instanceof ClientError) return { status: 400, text: error.message }
    this.#context.log.error({ err: error }, 'request failed')
    return { status: 500, text: 'internal error' }
  }

  #awaitAnswer(request: HttpRequest, answer: Promise<Buffer | TextAnswer>): void {
    this.#state = 'replying'
    this.#deadline = this.#context.now() + replyTimeoutMs
    void answer.then((late) => {
      if (this.#socket.destroyed) return
      this.#guarded(() => {
        const closing = !request.keepAlive || this.#context.closing || this.#context.leaving
        const reply = writeReply(late, request, closing)
        if (closing) this.#end([reply], { asked: !request.keepAlive })
        else if (this.#write([reply])) this.#advance()
      })
    })
  }

  /** Lets all others have their turn; then it goes on by itself. */
  #rest(): void {
    this.#taken = 0
    this.#state = 'resting'
    this.#deadline = Infinity
    this.#socket.pause()
    this.#context.turns.queue(() => {
      if (!this.#socket.destroyed) this.#guarded(() => this.#advance())
    })
  }

  /** False where the client has to read first; then it goes on by itself. */
  #write(replies: readonly Buffer[]): boolean {
    if (this.#send(replies)) return true
    this.#state = 'draining'
    this.#deadline = this.#context.now() + this.#context.idleTimeoutMs
    this.#socket.once('drain', () => this.#guarded(() => this.#advance()))
    return false
  }

  /**
   * Sends replies that others follow. Without `TCP_NODELAY` these would wait until the client's kernel acknowledges the first ones, up to 40 ms;
   * a connection that is closed with its first reply does not need it, and is spared the system call.
   */
  #send(replies: readonly Buffer[]): boolean {
    this.#socket.setNoDelay()
    return this.#socket.write(join(replies))
  }

  /** Nothing whole is there: waits for more. */
  #await(answered: boolean): void {
    const { now, idleTimeoutMs, headTimeoutMs, closing } = this.#context
    this.#taken = 0
    if (this.#halfClosed || (closing && this.#reader.blank)) {
      this.#refuseRest()
    } else if (this.#reader.blank) {
      this.#state = 'idle'
      this.#deadline = now() + idleTimeoutMs
    } else if (answered || this.#state !== 'reading') {
      // Set once for each head: a byte now and then does not buy more time.
      this.#state = 'reading'
      this.#deadline = now() + headTimeoutMs
    }
    if (this.#socket.isPaused()) this.#socket.resume()
  }

  #ended(): void {
    this.#halfClosed = true
    if (this.#state === 'idle' || this.#state === 'reading') this.#refuseRest()
  }

  /** No more requests: part of a head is refused, nothing at all is a polite end. */
  #refuseRest(): void {
    const rest = this.#reader.blank
      ? []
      : [refusal(400, 'the connection ends within the head of the request')]
    this.#end(rest)
  }

  /**
   * Sends the last replies and waits for the client's end. Where the client `asked` for the close it sends no more, and the
   * connection is closed as soon as the replies are out.
   */
  #end(replies: readonly Buffer[], { asked = false } = {}): void {
    this.#state = 'ending'
    this.#deadline = this.#context.now() + lingerMs
    const socket = this.#socket
    if (asked && this.#reader.held === 0) {
      if (replies.length > 0) socket.write(join(replies))
      // Closing alone sends the end too; where the kernel has it all, that saves a system call.
      if (socket.writableLength === 0) socket.destroy()
      else socket.destroySoon()
      return
    }
    if (replies.length > 0) socket.end(join(replies))
    else socket.end()
    if (socket.isPaused()) socket.resume()
  }
}

/** For the reply to a request that could not be read: whatever it was, HTTP/1.1 answers it. */
const unread = { method: 'GET', minorVersion: 1 } as const

function refusal(status: TextAnswer['status'], message: string): Buffer {
  return writeReply({ status, text: `Cannot read the request: ${message}` }, unread, true)
}

function join(replies: readonly Buffer[]): Buffer {
  const [first] = replies
  return replies.length === 1 && first !== undefined ? first : Buffer.concat(replies)
}

function ignore(): void {
  // Nothing to undo.
}

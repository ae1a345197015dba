import { randomUUID } from 'node:crypto'
import { promisify } from 'node:util'
import { gunzip, gzip } from 'node:zlib'
import { delay } from '../../../lib/runtime/backoff.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import type { RedisConnection } from '../../redis/connection.ts'
import { RedisUnavailable } from '../../redis/connection.ts'
import { readScript } from '../../redis/script-file.ts'

/** What servers that work as one tell and ask each other; what each keeps in its own memory is asked for, and not copied. */
export interface Gathering extends AsyncDisposable {
  /** Answers questions of a kind, those of this server included. What it returns is sent as JSON. */
  answer(kind: string, work: (question: unknown) => unknown): void
  /** Asks all servers, this one included. `missing`: those that did not answer, or `Redis`. */
  ask(kind: string, question: unknown): Promise<{ answers: unknown[]; missing: string[] }>
  /** Called with what other servers tell. */
  hear(kind: string, heard: (news: unknown) => void): void
  /** Tells the other servers; what cannot be told now is lost. */
  tell(kind: string, news: unknown): void
}

/** One server alone. */
export function createLonelyGathering(): Gathering {
  const works = new Map<string, (question: unknown) => unknown>()
  return {
    answer: (kind, work) => void works.set(kind, work),
    ask: async (kind, question) => ({ answers: [await works.get(kind)?.(question)], missing: [] }),
    hear: () => undefined,
    tell: () => undefined,
    [Symbol.asyncDispose]: async () => Promise.resolve(),
  }
}

/** How often a server says that it is there, and how long it is taken to be there after that. */
const presenceMs = 3000
const presentMs = 10_000
/** A question is answered within this, or the answer is without those that were too slow. */
const answerMs = 2000
/** Questions of this server that wait at once. */
const questionsMax = 100
/** What one server answers, once it is unpacked. */
const answerBytesMax = 256 * 1024 * 1024

const present = readScript(new URL('./scripts/present.lua', import.meta.url))
const pack = promisify(gzip)
const unpack = promisify(gunzip)

interface Waiting {
  readonly answers: unknown[]
  readonly awaited: Set<string>
  readonly done: () => void
}

type Message =
  | {
      readonly type: 'question'
      readonly id: string
      readonly to: string
      readonly kind: string
      readonly question: unknown
    }
  | { readonly type: 'answer'; readonly id: string; readonly name: string; readonly answer: unknown }
  | { readonly type: 'news'; readonly from: string; readonly kind: string; readonly news: unknown }

/**
 * Servers that know each other by one Redis. Questions, answers and news go by its channels, and nothing is kept there but who is there. While Redis
 * does not answer each server has its own answer alone, and says so.
 *
 * @param name of this server; no two may have one name
 */
export function startGathering({
  redis,
  name,
  log,
}: {
  redis: RedisConnection
  name: string
  log: Logger
}): Gathering {
  const ended = new AbortController()
  const works = new Map<string, (question: unknown) => unknown>()
  const listeners = new Map<string, (news: unknown) => void>()
  const waiting = new Map<string, Waiting>()
  const own = randomUUID()
  const everyone = `${redis.keyPrefix}servers:all`
  const channelOf = (instance: string) => `${redis.keyPrefix}servers:${instance}`

  const publish = async (channel: string, message: Message): Promise<void> => {
    await redis.call('PUBLISH', channel, await pack(JSON.stringify(message)))
  }
  /** Says that this server is there. @returns all that are */
  const say = async (milliseconds: number): Promise<string[]> => {
    const names = await redis.run(present, [`${redis.keyPrefix}servers`], [name, milliseconds])
    return (names as Buffer[]).map(String)
  }
  const answerTo = async ({ id, to, kind, question }: Extract<Message, { type: 'question' }>) => {
    const work = works.get(kind)
    if (work) await publish(channelOf(to), { type: 'answer', id, name, answer: await work(question) })
  }
  const take = (message: Message) => {
    switch (message.type) {
      case 'question':
        if (message.to !== own) return answerTo(message)
        return
      case 'answer': {
        const mine = waiting.get(message.id)
        if (!mine?.awaited.delete(message.name)) return
        mine.answers.push(message.answer)
        if (mine.awaited.size === 0) mine.done()
        return
      }
      case 'news':
        if (message.from !== own) listeners.get(message.kind)?.(message.news)
    }
  }
  const heard = (bytes: Buffer) => {
    unpack(bytes, { maxOutputLength: answerBytesMax })
      .then((text) => take(JSON.parse(text.toString()) as Message))
      .catch((error: unknown) => {
        if (!(error instanceof RedisUnavailable) && !ended.signal.aborted)
          log.warn({ err: error }, 'what another server said was not understood')
      })
  }
  // Whoever is present is awaited, so this server must hear questions first.
  const running = (async () => {
    await Promise.all([
      redis.subscribe(everyone, heard, ended.signal),
      redis.subscribe(channelOf(own), heard, ended.signal),
    ])
    while (!ended.signal.aborted) {
      await say(presentMs).catch(() => undefined)
      await delay(presenceMs, ended.signal).catch(() => undefined)
    }
  })()

  const askOthers = async (kind: string, question: unknown) => {
    if (waiting.size >= questionsMax) throw new RedisUnavailable(`${questionsMax} questions wait already`)
    const awaited = new Set(await say(presentMs))
    awaited.delete(name)
    if (awaited.size === 0) return { answers: [], missing: [] }
    const id = randomUUID()
    const over = new AbortController()
    const answers: unknown[] = []
    waiting.set(id, {
      answers,
      awaited,
      done: () => {
        over.abort()
      },
    })
    try {
      await publish(everyone, { type: 'question', id, to: own, kind, question })
      await delay(answerMs, AbortSignal.any([over.signal, ended.signal])).catch(() => undefined)
    } finally {
      waiting.delete(id)
    }
    return { answers, missing: [...awaited] }
  }

  return {
    answer: (kind, work) => void works.set(kind, work),
    ask: async (kind, question) => {
      const others = askOthers(kind, question).catch((error: unknown) => {
        if (!(error instanceof RedisUnavailable)) throw error
        return { answers: [], missing: ['Redis'] }
      })
      const mine = await works.get(kind)?.(question)
      const { answers, missing } = await others
      return { answers: [mine, ...answers], missing }
    },
    hear: (kind, listener) => void listeners.set(kind, listener),
    tell: (kind, news) => {
      publish(everyone, { type: 'news', from: own, kind, news }).catch(() => undefined)
    },
    [Symbol.asyncDispose]: async () => {
      ended.abort()
      await say(0).catch(() => undefined)
      await running
    },
  }
}

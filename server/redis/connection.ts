import { createHash } from 'node:crypto'
import { Cluster, Command, Redis } from 'ioredis'
import { backoff } from '../../lib/runtime/backoff.ts'
import type { Logger } from '../../lib/runtime/log.ts'

/** Where Redis is, and how long anybody waits for it. */
export interface RedisSettings {
  readonly mode: 'single' | 'sentinel' | 'cluster'
  /** One for `single`; else those that are asked first for the others: Sentinels, or nodes of the Cluster. */
  readonly addresses: readonly RedisAddress[]
  /** The number of the database; 0 in a Cluster. */
  readonly database: number
  /** A user of Redis' ACL; undefined for the default one. */
  readonly username: string | undefined
  readonly password: string | undefined
  readonly sentinel:
    | {
        /** What the Sentinels call the primary. */
        readonly name: string
        readonly username: string | undefined
        readonly password: string | undefined
      }
    | undefined
  /** Undefined for plaintext. */
  readonly tls: RedisTls | undefined
  /** What every key begins with; a Redis may have other users. */
  readonly keyPrefix: string
  readonly connectTimeoutMs: number
  /** A command that takes longer has failed. */
  readonly commandTimeoutMs: number
  /** Commands under way at once; beyond it they fail at once. */
  readonly callsMax: number
}

export type RedisAddress = { readonly host: string; readonly port: number } | { readonly path: string }

/** PEM text, where it is not the system's authorities or no client certificate. */
export interface RedisTls {
  readonly ca: string | undefined
  readonly cert: string | undefined
  readonly key: string | undefined
}

/** A script in Lua; its text is sent once to each server that does not know it. */
export interface RedisScript {
  readonly name: string
  readonly text: string
  /** Of the text, in hex. */
  readonly sha1: string
}

export type RedisArgument = string | number | Buffer

/** Redis cannot be asked now, whatever is asked: it does not answer, is gone, is loading, has no primary, or too much waits for it. */
export class RedisUnavailable extends Error {
  override readonly name = 'RedisUnavailable'
}

/** A command as Redis refused it; `code` is the first word of its answer: `OOM`, `WRONGTYPE`, `NOPERM`, `ERR`. */
export class RedisRefused extends Error {
  override readonly name = 'RedisRefused'
  readonly code: string

  constructor(command: string, answer: string) {
    super(`Redis refused ${command}: ${answer}`)
    this.code = /^[A-Z]+/.exec(answer)?.[0] ?? 'ERR'
  }
}

export interface RedisStats {
  /** Whether the last thing heard was an answer. */
  readonly isUp: boolean
  /** Commands under way. */
  readonly calls: number
  /** Since the start, by how they ended. */
  readonly answered: number
  readonly refused: number
  readonly unavailable: number
}

/**
 * A connection to Redis, whatever stands behind it: one server, the primary that Sentinels know, or a Cluster. It comes back by itself,
 * after a delay that grows and is different for each server. Commands are sent in one pipeline; none waits for a connection that is not
 * there, none longer than `commandTimeoutMs`, and never more than `callsMax` of them.
 */
export interface RedisConnection extends AsyncDisposable {
  readonly keyPrefix: string
  readonly isCluster: boolean
  /**
   * Runs a script. All keys must have one hash tag, for Clusters. Bulk strings come as Buffers, numbers as numbers.
   *
   * @throws RedisUnavailable, RedisRefused
   */
  run(script: RedisScript, keys: readonly RedisArgument[], args: readonly RedisArgument[]): Promise<unknown>
  /** Sends one command; in a Cluster to where its first key is. @throws RedisUnavailable, RedisRefused */
  call(command: string, ...args: readonly RedisArgument[]): Promise<unknown>
  /** Of a Cluster every primary, else the one server: for commands without a key. @throws RedisUnavailable, RedisRefused */
  callEach(command: string, ...args: readonly RedisArgument[]): Promise<unknown[]>
  /** Listens to what is published on a channel, over a connection of its own, until the signal aborts; what is published while that connection is away is lost. */
  subscribe(channel: string, heard: (message: Buffer) => void, signal: AbortSignal): Promise<void>
  /** Calls back whenever Redis answers again after it did not, and when it stops. @returns how to stop that */
  onChange(changed: (isUp: boolean) => void): () => void
  stats(): RedisStats
}

export function redisScript(name: string, text: string): RedisScript {
  return { name, text, sha1: createHash('sha1').update(text).digest('hex') }
}

export type CommandOutcome = 'answered' | 'refused' | 'unavailable'

export interface RedisDeps {
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  readonly log: Logger
  /** Told of each command that was sent. */
  readonly observe?: ((outcome: CommandOutcome, seconds: number) => void) | undefined
}

const reconnectFirstMs = 50
const reconnectMaxMs = 2000
/** What Redis says when it is the server, and not the command, that is wrong. */
const unavailableAnswers =
  /^(LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|BUSY|MISCONF|UNKILLABLE|NOAUTH|WRONGPASS)\b/

/**
 * Connects in the background: what is returned may not be up yet. Wrong settings and a Redis that is away look the same from here, so both
 * are logged, and are what `onChange` and `stats` are for.
 */
export function openRedis(settings: RedisSettings, { random, log, observe }: RedisDeps): RedisConnection {
  const client = createClient(settings, random)
  const listeners = new Set<(isUp: boolean) => void>()
  let isUp = false
  let calls = 0
  let lastFault: string | undefined
  const counts = { answered: 0, refused: 0, unavailable: 0 }
  const known = new Set<string>()
  const ending = new AbortController()

  const heard = (up: boolean, fault?: Error) => {
    if (up) lastFault = undefined
    else if (fault && fault.message !== lastFault && !ending.signal.aborted) {
      lastFault = fault.message
      log.warn({ redis: fault.message }, 'Redis does not answer')
    }
    if (isUp === up) return
    isUp = up
    if (up) log.info('Redis answers')
    for (const changed of listeners) changed(up)
  }
  client.on('ready', () => {
    heard(true)
  })
  client.on('close', () => {
    // A Cluster closes when its last node is gone.
    known.clear()
    heard(false)
  })
  client.on('error', (error: Error) => {
    heard(false, error)
  })

  const fail = (command: string, error: unknown): Error => {
    const { message, name } = error as Error
    if (name === 'ReplyError' && !unavailableAnswers.test(message)) {
      counts.refused++
      return new RedisRefused(command, message)
    }
    counts.unavailable++
    const unavailable = new RedisUnavailable(`Redis does not answer ${command}: ${message}`, { cause: error })
    heard(false, unavailable)
    return unavailable
  }
  const send = async (
    command: string,
    args: readonly RedisArgument[],
    to: Redis | Cluster = client,
  ): Promise<unknown> => {
    if (calls >= settings.callsMax) {
      counts.unavailable++
      throw new RedisUnavailable(`Redis was not asked ${command}: ${settings.callsMax} commands wait already`)
    }
    calls++
    const sentAtMs = performance.now()
    const ended = (outcome: CommandOutcome) => observe?.(outcome, (performance.now() - sentAtMs) / 1000)
    if (to instanceof Redis) gather(to)
    try {
      const answer = await to.sendCommand(new WholeCommand(command, [...args], { replyEncoding: null }))
      counts.answered++
      ended('answered')
      heard(true)
      return answer
    } catch (error) {
      const failure = fail(command, error)
      ended(failure instanceof RedisRefused ? 'refused' : 'unavailable')
      throw failure
    } finally {
      calls--
    }
  }

  /** What is sent before the program waits goes out in one write: writes are what a client that is busy spends most on. */
  const gather = ({ stream, status }: Redis) => {
    if (status !== 'ready' || stream.writableCorked > 0) return
    stream.cork()
    process.nextTick(() => {
      stream.uncork()
    })
  }

  return {
    keyPrefix: settings.keyPrefix,
    isCluster: settings.mode === 'cluster',
    run: async (script, keys, args) => {
      const rest = [keys.length, ...keys, ...args]
      if (!known.has(script.sha1)) {
        const answer = await send('EVAL', [script.text, ...rest])
        known.add(script.sha1)
        return answer
      }
      try {
        return await send('EVALSHA', [script.sha1, ...rest])
      } catch (error) {
        if (!(error instanceof RedisRefused) || error.code !== 'NOSCRIPT') throw error
        return await send('EVAL', [script.text, ...rest])
      }
    },
    call: async (command, ...args) => send(command, args),
    callEach: async (command, ...args) =>
      Promise.all(
        (client instanceof Cluster ? client.nodes('master') : [client]).map(async (node) =>
          send(command, args, node),
        ),
      ),
    subscribe: async (channel, onMessage, signal) => {
      const own = createClient(settings, random)
      own.on('error', (error: Error) => {
        log.debug({ redis: error.message }, 'the subscription to Redis is away')
      })
      own.on('messageBuffer', (_channel: Buffer, message: Buffer) => {
        onMessage(message)
      })
      const end = () => {
        own.disconnect()
      }
      for (const over of [signal, ending.signal]) over.addEventListener('abort', end, { once: true })
      await new Promise<void>((resolve) => {
        const subscribe = () => {
          own.subscribe(channel).then(
            () => {
              resolve()
            },
            () => undefined,
          )
        }
        own.on('ready', subscribe)
        own.once('end', () => {
          resolve()
        })
      })
    },
    onChange: (changed) => {
      listeners.add(changed)
      return () => {
        listeners.delete(changed)
      }
    },
    stats: () => ({ isUp, calls, ...counts }),
    [Symbol.asyncDispose]: async () => {
      ending.abort()
      listeners.clear()
      client.disconnect()
      await Promise.resolve()
    },
  }
}

/** Written into one buffer: ioredis makes one of every argument, and then one of them all, which costs more than all else that it does. */
class WholeCommand extends Command {
  override toWritable(): Buffer {
    const parts = [this.name, ...(this.args as (string | Buffer)[])]
    let length = partHeadMax
    for (const part of parts) length += partHeadMax + Buffer.byteLength(part)
    const bytes = Buffer.allocUnsafe(length)
    let at = bytes.write(`*${parts.length}\r\n`, 'latin1')
    for (const part of parts) {
      at += bytes.write(`$${Buffer.byteLength(part)}\r\n`, at, 'latin1')
      if (typeof part === 'string') at += bytes.write(part, at)
      else at += part.copy(bytes, at)
      bytes[at++] = 0x0d
      bytes[at++] = 0x0a
    }
    return bytes.subarray(0, at)
  }
}

/** Bytes of a length in decimal, and what stands round it and after the part. */
const partHeadMax = 16

function createClient(settings: RedisSettings, random: () => number): Redis | Cluster {
  const delays = () => {
    let waits = backoff({ firstMs: reconnectFirstMs, maxMs: reconnectMaxMs, random })
    return (times: number) => {
      if (times === 1) waits = backoff({ firstMs: reconnectFirstMs, maxMs: reconnectMaxMs, random })
      return waits.next().value
    }
  }
  const tls = settings.tls && {
    ...(settings.tls.ca !== undefined && { ca: settings.tls.ca }),
    ...(settings.tls.cert !== undefined && { cert: settings.tls.cert }),
    ...(settings.tls.key !== undefined && { key: settings.tls.key }),
  }
  const options = {
    ...(settings.username !== undefined && { username: settings.username }),
    ...(settings.password !== undefined && { password: settings.password }),
    connectTimeout: settings.connectTimeoutMs,
    commandTimeout: settings.commandTimeoutMs,
    maxRetriesPerRequest: 0,
    autoResendUnfulfilledCommands: false,
    // `subscribe` does that: of what ioredis asks by itself nobody handles the rejection when the connection is lost meanwhile.
    autoResubscribe: false,
    // A primary that was demoted says so: the Sentinels know the new one.
    reconnectOnError: (error: Error) => error.message.startsWith('READONLY'),
    enableAutoPipelining: false,
    ...(tls && { tls }),
  }
  const { sentinel, addresses } = settings
  const hosts = addresses.flatMap((address) => ('path' in address ? [] : [address]))
  switch (settings.mode) {
    case 'cluster':
      return new Cluster([...hosts], {
        redisOptions: options,
        enableOfflineQueue: false,
        slotsRefreshTimeout: settings.connectTimeoutMs,
        clusterRetryStrategy: delays(),
      })
    case 'sentinel':
      return new Redis({
        ...options,
        enableOfflineQueue: false,
        retryStrategy: delays(),
        db: settings.database,
        sentinels: [...hosts],
        name: sentinel?.name ?? '',
        ...(sentinel?.username !== undefined && { sentinelUsername: sentinel.username }),
        ...(sentinel?.password !== undefined && { sentinelPassword: sentinel.password }),
        ...(tls && { sentinelTLS: tls, enableTLSForSentinelMode: true }),
        sentinelRetryStrategy: delays(),
        failoverDetector: true,
      })
    case 'single': {
      const [address] = addresses
      return new Redis({
        ...options,
        ...address,
        enableOfflineQueue: false,
        retryStrategy: delays(),
        db: settings.database,
      })
    }
  }
}

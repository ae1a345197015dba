import { readFile, rename } from 'node:fs/promises'
import { HostCredential } from '../lib/client/api.ts'
import { RequestError } from '../lib/client/http.ts'
import type { ServerClient } from '../lib/client/server-client.ts'
import { backoff, delay } from '../lib/runtime/backoff.ts'
import { isMissing, writeFileAtomic } from '../lib/runtime/files.ts'
import type { Logger } from '../lib/runtime/log.ts'

/** The host's own credential: got by enrolment, kept 0600, renewed at two thirds of its life. */
export interface Credential {
  readonly current: HostCredential | undefined
  /** Resolves once there is one. */
  ready(signal: AbortSignal): Promise<void>
  /** Why there is none yet, in words for a person. */
  readonly reason: string | undefined
  /** Enrols if need be, and renews in time, until aborted. */
  run(signal: AbortSignal): Promise<void>
}

export interface CredentialDeps {
  server: Pick<ServerClient, 'enroll' | 'renew'>
  now: () => number
  random: () => number
  log: Logger
}

interface Stored {
  readonly credential: HostCredential
  /** Epoch milliseconds; the server may be another than that of the last run. */
  readonly obtainedAt: number
  readonly server: string
}

/** Longest sleep between looks at the clock: a host that was suspended renews soon after it wakes. */
const lookMs = 10 * 60_000

export async function openCredential(
  options: {
    file: string
    server: string
    host: string
    place: string | undefined
    /** Read when it is needed, so that it may be put there later. */
    bootstrapToken: () => Promise<string | undefined>
  },
  deps: CredentialDeps,
): Promise<Credential> {
  const { now, random, log } = deps
  let stored = await readStored(options.file, log)
  if (stored && (stored.server !== options.server || stored.credential.host !== options.host)) {
    log.info({ host: options.host }, 'the kept credential is of another server or host: enrolling anew')
    stored = undefined
  }
  let reason: string | undefined
  let got = Promise.withResolvers<undefined>()
  const isGood = () => stored !== undefined && Date.parse(stored.credential.expiresAt) > now()
  if (isGood()) got.resolve(undefined)

  /** It is in memory and not yet on disk: a restart would need the bootstrap token again. */
  let unwritten = false
  const write = async () => {
    await writeFileAtomic(options.file, `${JSON.stringify(stored)}\n`, { mode: 0o600 })
    unwritten = false
    reason = undefined
  }
  const keep = async (credential: HostCredential) => {
    stored = { credential, obtainedAt: now(), server: options.server }
    unwritten = true
    // Who waits for it need not wait for the disk.
    got.resolve(undefined)
    await write()
  }

  const enrol = async (signal: AbortSignal): Promise<void> => {
    const bootstrapToken = await options.bootstrapToken()
    if (bootstrapToken === undefined) {
      throw new Error(
        'Cannot enrol: no bootstrap token; set bootstrap_token_file or RACKSWARM_BOOTSTRAP_TOKEN',
      )
    }
    await keep(
      await deps.server.enroll(
        {
          bootstrapToken,
          host: options.host,
          ...(options.place === undefined ? {} : { place: options.place }),
        },
        AbortSignal.any([signal, AbortSignal.timeout(15_000)]),
      ),
    )
    log.info({ host: options.host, place: stored?.credential.place }, 'enrolled')
  }

  return {
    get current() {
      return isGood() ? stored?.credential : undefined
    },
    get reason() {
      return reason
    },
    ready: async (signal) => {
      signal.throwIfAborted()
      const aborted = Promise.withResolvers<never>()
      const leave = () => {
        aborted.reject(signal.reason as Error)
      }
      signal.addEventListener('abort', leave, { once: true })
      try {
        await Promise.race([got.promise, aborted.promise])
      } finally {
        signal.removeEventListener('abort', leave)
      }
    },
    run: async (signal) => {
      let waits = backoff({ firstMs: 500, maxMs: 30_000, random })
      const ended = () => signal.aborted
      /** `got` was kept: when the credential expires, a new one is promised, once. */
      let waitedFor = isGood()
      while (!ended()) {
        let waitMs = lookMs
        try {
          if (!stored || !isGood()) {
            if (waitedFor) got = Promise.withResolvers()
            waitedFor = false
            await enrol(signal)
            waitedFor = true
          } else {
            waitedFor = true
            if (unwritten) await write()
            const life = Date.parse(stored.credential.expiresAt) - stored.obtainedAt
            const renewAt = stored.obtainedAt + (life * 2) / 3
            if (now() >= renewAt) {
              await keep(await deps.server.renew(AbortSignal.any([signal, AbortSignal.timeout(15_000)])))
              log.info({ expiresAt: stored.credential.expiresAt }, 'credential renewed')
            }
            waitMs = Math.min(lookMs, Math.max(1000, renewAt - now()))
          }
          waits = backoff({ firstMs: 500, maxMs: 30_000, random })
        } catch (error) {
          if (ended()) return
          const was = reason
          reason = (error as Error).message
          waitMs = waits.next().value
          // Refusals do not pass by themselves, but the operator may lift them.
          const hint = error instanceof RequestError ? error.hint : undefined
          if (was !== reason)
            log.warn(
              { reason, hint },
              isGood() ? 'credential is not renewed yet' : 'not enrolled yet: trying again',
            )
        }
        await delay(waitMs, signal).catch(() => undefined)
      }
    },
  }
}

async function readStored(file: string, log: Logger): Promise<Stored | undefined> {
  try {
    const stored = JSON.parse(await readFile(file, 'utf8')) as {
      credential?: unknown
      obtainedAt?: unknown
      server?: unknown
    }
    if (typeof stored.obtainedAt !== 'number' || typeof stored.server !== 'string')
      throw new Error('members are missing')
    return {
      credential: HostCredential.parse(stored.credential),
      obtainedAt: stored.obtainedAt,
      server: stored.server,
    }
  } catch (error) {
    if (isMissing(error)) return undefined
    log.warn(
      { file, error: (error as Error).message },
      'the kept credential cannot be read: set aside, enrolling anew',
    )
    await rename(file, `${file}.broken`)
    return undefined
  }
}

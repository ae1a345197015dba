import { join } from 'node:path'
import { calculateJwkThumbprint, importJWK } from 'jose'
import { ClientError } from '../protocol/errors.ts'
import { delay } from '../runtime/backoff.ts'
import { monotonicMs } from '../runtime/clock.ts'
import { withFileLock } from '../runtime/file-lock.ts'
import { makeDirectory } from '../runtime/files.ts'
import type { Logger } from '../runtime/log.ts'
import { silentLog } from '../runtime/log.ts'
import { createTurn } from '../runtime/turn.ts'
import type { Algorithm } from './algorithms.ts'
import { readPrivateKey } from './private-key.ts'
import type { SigningKey } from './signing-keys.ts'
import {
  activeKey,
  makeSigningKey,
  publicJwk,
  readSigningKeys,
  removeSigningKey,
  signingKeysVersion,
  signedUnknownMs,
  writeSigningKey,
} from './signing-keys.ts'
import type { KeySource, VerificationKey } from './verification-key.ts'
import { importVerificationKey } from './verification-key.ts'

/** A step of a key, whether somebody asked for it or its time had come. */
export interface KeyChange {
  readonly kind: 'create' | 'activate' | 'remove'
  readonly kid: string
}

export interface KeyRingOptions {
  readonly directory: string
  /** Of keys that are made. */
  readonly algorithm: Algorithm
  /** How long a new key is published before it signs. Default: 10 min. */
  readonly leadMs?: number | undefined
  /** An active key of this age is followed by a new one. Default: never. */
  readonly rotationMs?: number | undefined
  /** Tokens are accepted for so long after they expired. */
  readonly clockToleranceMs: number
  readonly now: () => number
  /**
   * Several servers have the directory, and each sees within so many milliseconds what another has written. A key that is to sign at once is
   * published for as long first. Default: the directory is this server's alone.
   */
  readonly settleMs?: number | undefined
  readonly log?: Logger | undefined
  /** Lets somebody write down a change before it happens; one that rejects keeps it from happening. */
  readonly aroundChange?: ((change: KeyChange, work: () => Promise<void>) => Promise<void>) | undefined
}

/** The key that signs now. */
export interface Signer {
  readonly key: SigningKey
  readonly secret: Awaited<ReturnType<typeof importJWK>>
  readonly verification: VerificationKey
}

/**
 * The signing keys of a server: next → active → retiring → removed, each step in the key files before it is in force.
 *
 * - A next key is published for `leadMs` of running time before it signs: whoever fetches the key set knows it by then.
 * - A retiring key verifies until the last token that it signed has expired.
 * - Servers that share the files see each other's steps within a second or two. They need no lock to agree: a key only goes forward, so of
 *   two who write one file the later step stands, and who finds an earlier one in it than it knows of writes the later one again. What is to
 *   be done once, making a key, is done under a lock.
 */
export interface KeyRing extends KeySource, AsyncDisposable {
  readonly signer: Signer
  /** In the order in which they were made. */
  list(): SigningKey[]
  /** When a next key becomes active, and a retiring one goes; undefined for the active one. */
  dueAt(key: SigningKey): Date | undefined
  /** Call before a token is signed: that it was, and until when, must be known to later starts. Undefined where it is known. */
  willSign(signer: Signer, expiresAtMs: number): Promise<void> | undefined
  /** Makes the next key; `atOnce` also has it sign, and takes the one that waits already. Rejects with ClientError `ROTATION_UNDER_WAY`. */
  rotate(options: { algorithm?: Algorithm | undefined; atOnce: boolean }): Promise<SigningKey>
  /** Takes a key from elsewhere: as the next one, or only to verify. Rejects with ClientError. */
  add(key: ForeignKey, options: { verifyOnly: boolean }): Promise<SigningKey>
  /** Ends a key and all that it signed, at once; another one signs then. @returns undefined where there is none of that name */
  revoke(kid: string): Promise<SigningKey | undefined>
  /** Does what is due; it is also done by itself, every second. */
  turnOver(): Promise<void>
}

/** Twice what a verifier may take to look again, by the `max-age` of our own key set. */
const leadMsDefault = 600_000
const lookMs = 1000
/** Tokens of keys that nobody knows must not have the directory read for each of them. */
const lookAgainMs = 250
/** A few of each state are many. */
const keysMax = 50
/** The mark of `signedUntil` is set ahead, so that it is written now and then and not for each token. */
const markAheadMinMs = 3_600_000
const markAheadMaxMs = 7 * 86_400_000

/** Opens the key files, and makes the first key where there is none. @throws Error naming a key file that cannot be used, or saying that no key is active */
export async function openKeyRing(options: KeyRingOptions): Promise<KeyRing> {
  const {
    directory,
    algorithm,
    now,
    clockToleranceMs,
    leadMs = leadMsDefault,
    rotationMs,
    settleMs,
  } = options
  const log = options.log ?? silentLog()
  const around = options.aroundChange ?? ((_change, work) => work())
  const turn = createTurn()
  const ended = new AbortController()
  const keys = new Map<string, SigningKey>()
  const verification = new Map<string, VerificationKey>()
  /** Time that the server was away nobody could see a new key in. */
  const publishedAtMs = new Map<string, number>()

  const put = (key: SigningKey) => {
    keys.set(key.kid, key)
    if (verification.has(key.kid)) return
    verification.set(key.kid, importVerificationKey(publicJwk(key)))
    publishedAtMs.set(key.kid, now())
  }
  const write = async (key: SigningKey): Promise<SigningKey> => {
    await writeSigningKey(directory, key)
    put(key)
    return key
  }
  const remove = async (key: SigningKey): Promise<void> => {
    await removeSigningKey(directory, key)
    forget(key)
  }
  const forget = ({ kid, createdAt }: SigningKey): void => {
    keys.delete(kid)
    verification.delete(kid)
    publishedAtMs.delete(kid)
    if (settleMs !== undefined) gone.set(kid, createdAt.getTime())
  }
  const list = () => [...keys.values()].sort((a, b) => a.createdAt.getTime() - b.createdAt.getTime())
  const inState = (state: SigningKey['state']) => list().filter((key) => key.state === state)

  /** Work that one of several servers does at a time, on what the others have done before. */
  const exclusively = <Result>(work: () => Promise<Result>): Promise<Result> =>
    turn(() =>
      settleMs === undefined
        ? work()
        : withFileLock(join(directory, '.lock'), async () => {
            await readAgain()
            return work()
          }),
    )
  let readVersion = ''
  /** Keys that went, by when they were made: a server that knew less may have written one again. */
  const gone = new Map<string, number>()
  /** What other servers have written since. */
  const readAgain = async (): Promise<void> => {
    const version = await signingKeysVersion(directory)
    if (version === readVersion) return
    const found = await readSigningKeys(directory)
    for (const key of found) {
      const known = keys.get(key.kid)
      if (gone.get(key.kid) === key.createdAt.getTime()) await remove(key)
      else if (!known) put(key)
      else {
        const later = laterOf(known, key)
        if (isSameStep(later, key)) put(later)
        else await write(later)
      }
    }
    const kids = new Set(found.map(({ kid }) => kid))
    for (const key of list()) if (!kids.has(key.kid)) forget(key)
    readVersion = version
    const active = activeKey(list())
    if (active && active.kid !== signer.key.kid) {
      signer = await signerOf(active, verification)
      log.info({ kid: active.kid }, 'another server has changed the signing key')
    }
  }

  await makeDirectory(directory, 0o700)
  const openFirst = async () => {
    const found = await readSigningKeys(directory)
    for (const key of found) put(key)
    if (found.length > 0) return
    const first = await makeSigningKey(algorithm, 'active', now())
    await around({ kind: 'create', kid: first.kid }, async () => {
      await write(first)
    })
  }
  await (settleMs === undefined ? openFirst() : withFileLock(join(directory, '.lock'), openFirst))
  const first = activeKey(list())
  if (!first) throw new Error(`Cannot sign: none of the ${keys.size} keys in ${directory} is active`)
  let signer = await signerOf(first, verification)

  const activate = (key: SigningKey): Promise<void> =>
    around({ kind: 'activate', kid: key.kid }, async () => {
      // First the new one: a crash in between leaves two that are active, of which the later one signs.
      const active = await write({ ...key, state: 'active', since: new Date(now()) })
      signer = await signerOf(active, verification)
      await retireOthers()
      log.info({ kid: key.kid }, 'signing key is active')
    })
  const retireOthers = async (): Promise<void> => {
    for (const key of inState('active'))
      if (key.kid !== signer.key.kid) await write({ ...key, state: 'retiring', since: new Date(now()) })
  }

  const dueAtMs = (key: SigningKey): number => {
    switch (key.state) {
      case 'next':
        return (publishedAtMs.get(key.kid) ?? now()) + leadMs
      case 'active':
        return Infinity
      case 'retiring':
        return key.signedUntil.getTime() + clockToleranceMs
    }
  }
  const create = async (wanted: Algorithm): Promise<SigningKey> => {
    checkRoom(keys.size)
    const fresh = await makeSigningKey(wanted, 'next', now())
    await around({ kind: 'create', kid: fresh.kid }, async () => {
      await write(fresh)
      log.info({ kid: fresh.kid }, 'signing key was made')
    })
    return fresh
  }
  const turnOver = async (): Promise<void> => {
    if (settleMs !== undefined) await readAgain()
    await retireOthers()
    for (const key of inState('next')) if (dueAtMs(key) <= now()) await activate(key)
    for (const key of inState('retiring'))
      if (dueAtMs(key) <= now()) {
        await around({ kind: 'remove', kid: key.kid }, () => remove(key))
        log.info({ kid: key.kid }, 'signing key has retired')
      }
  }
  const isRotationDue = () =>
    rotationMs !== undefined &&
    now() - signer.key.since.getTime() >= rotationMs - leadMs &&
    inState('next').length === 0
  const lookAfter = async (): Promise<void> => {
    await turn(turnOver)
    if (isRotationDue())
      await exclusively(async () => {
        if (isRotationDue()) await create(algorithm)
      })
  }
  /** Until other servers know a key that was made a moment ago. */
  const published = async ({ kid }: SigningKey): Promise<void> => {
    const waitMs = (publishedAtMs.get(kid) ?? now()) + (settleMs ?? 0) - now()
    if (settleMs !== undefined && waitMs > 0) await delay(Math.min(waitMs, settleMs), ended.signal)
  }
  let lookedMs = -Infinity
  const lookAgain = (): Promise<void> | undefined => {
    if (settleMs === undefined || monotonicMs() - lookedMs < lookAgainMs) return undefined
    lookedMs = monotonicMs()
    return turn(readAgain).catch(() => undefined)
  }
  let failed = ''
  let looksUnderWay = false
  const looking = setInterval(() => {
    if (looksUnderWay) return
    looksUnderWay = true
    lookAfter()
      .finally(() => {
        looksUnderWay = false
      })
      .then(() => {
        failed = ''
      })
      .catch((error: unknown) => {
        const reason = error instanceof Error ? error.message : String(error)
        if (reason !== failed)
          log.error({ err: error }, 'signing keys could not be turned over: trying again')
        failed = reason
      })
  }, lookMs)
  looking.unref()

  return {
    keys: verification,
    get signer() {
      return signer
    },
    list,
    dueAt: (key) => (key.state === 'active' ? undefined : new Date(dueAtMs(key))),
    willSign: ({ key: { kid } }, expiresAtMs) => {
      const known = keys.get(kid)
      if (!known || known.signedUntil.getTime() >= expiresAtMs) return undefined
      return turn(async () => {
        if (settleMs !== undefined) await readAgain()
        const current = keys.get(kid)
        if (!current || current.signedUntil.getTime() >= expiresAtMs) return
        const aheadMs = Math.min(markAheadMaxMs, Math.max(markAheadMinMs, (expiresAtMs - now()) / 4))
        await write({ ...current, signedUntil: new Date(expiresAtMs + aheadMs) })
      })
    },
    rotate: ({ algorithm: wanted = algorithm, atOnce }) =>
      exclusively(async () => {
        const [waiting] = inState('next')
        if (waiting && !atOnce)
          throw new ClientError(
            'ROTATION_UNDER_WAY',
            `Cannot rotate: key ${waiting.kid} becomes active at ${new Date(dueAtMs(waiting)).toISOString()} already`,
          )
        const next = waiting ?? (await create(wanted))
        if (atOnce) {
          await published(next)
          await activate(next)
        }
        return keys.get(next.kid) ?? next
      }),
    add: (key, { verifyOnly }) =>
      exclusively(async () => {
        checkRoom(keys.size)
        if (list().some(({ kid, thumbprint }) => kid === key.kid || thumbprint === key.thumbprint))
          throw new ClientError('KEY_EXISTS', `Cannot import key ${key.kid}: it is there already`)
        const at = new Date(now())
        return write({
          ...key,
          state: verifyOnly ? 'retiring' : 'next',
          createdAt: at,
          since: at,
          signedUntil: new Date(now() + signedUnknownMs),
        })
      }),
    revoke: (kid) =>
      exclusively(async () => {
        const key = keys.get(kid)
        if (!key) return undefined
        if (key.kid === signer.key.kid) {
          const other = inState('next')[0] ?? (await create(algorithm))
          await published(other)
          await activate(other)
        }
        await remove(keys.get(kid) ?? key)
        return key
      }),
    turnOver: lookAfter,
    lookAgain,
    [Symbol.asyncDispose]: async () => {
      clearInterval(looking)
      ended.abort(new Error('the server ends'))
      await turn(async () => undefined)
    },
  }
}

/** What is known of a key together: it only goes forward, and what it has signed it has. */
function laterOf(a: SigningKey, b: SigningKey): SigningKey {
  const later =
    stepOf(a) > stepOf(b) || (stepOf(a) === stepOf(b) && a.since.getTime() >= b.since.getTime()) ? a : b
  const signedUntil = a.signedUntil.getTime() > b.signedUntil.getTime() ? a.signedUntil : b.signedUntil
  return { ...later, signedUntil }
}

function stepOf({ state }: SigningKey): number {
  return ['next', 'active', 'retiring'].indexOf(state)
}

function isSameStep(a: SigningKey, b: SigningKey): boolean {
  return (
    a.state === b.state &&
    a.since.getTime() === b.since.getTime() &&
    a.signedUntil.getTime() === b.signedUntil.getTime()
  )
}

async function signerOf(
  key: SigningKey,
  verification: ReadonlyMap<string, VerificationKey>,
): Promise<Signer> {
  const known = verification.get(key.kid)
  if (!known) throw new Error(`Cannot sign: key ${key.kid} is not among those that verify`)
  return { key, secret: await importJWK(key.privateJwk, key.algorithm), verification: known }
}

/** A key that was made elsewhere. */
export type ForeignKey = Pick<SigningKey, 'kid' | 'thumbprint' | 'algorithm' | 'privateJwk'>

/** Reads a key from elsewhere (see readPrivateKey), under a name of the caller's choice or its own. Rejects with ClientError `BAD_KEY`. */
export async function readForeignKey(text: string, kid: string | undefined): Promise<ForeignKey> {
  try {
    const { jwk, algorithm, kid: own } = readPrivateKey(text)
    const thumbprint = await calculateJwkThumbprint(jwk)
    return { kid: kid ?? own ?? thumbprint, thumbprint, algorithm, privateJwk: jwk }
  } catch (cause) {
    throw new ClientError('BAD_KEY', `Cannot import key: ${(cause as Error).message}`, { cause })
  }
}

function checkRoom(count: number): void {
  if (count >= keysMax)
    throw new ClientError(
      'TOO_MANY_KEYS',
      `Cannot add a key: there are ${count}, revoke some that are not needed`,
    )
}

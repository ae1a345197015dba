import type { Logger } from '../runtime/log.ts'
import { silentLog } from '../runtime/log.ts'
import type { TokenVerifier } from './claims.ts'
import type { KeySetStatus } from './current-keys.ts'
import type { KeySetSource } from './key-set.ts'
import { openKeySet } from './key-set.ts'
import type { Trust } from './token-authority.ts'
import type { VerifierStats } from './verifier.ts'
import { createVerifier } from './verifier.ts'
import type { VerifyPool } from './verify-pool.ts'
import { createVerifyPool } from './verify-pool.ts'

/** Takes tokens that another process signs. */
export interface KeySetVerifier extends TokenVerifier, AsyncDisposable {
  /** Reads the keys again. Rejects with what is wrong, and keeps the last good set. */
  reload(): Promise<void>
  keySetStatus(): KeySetStatus
  verifierStats(): VerifierStats
}

/**
 * Opens a verifier by a key set from elsewhere: a JWKS file, or a URL.
 *
 * @throws Error naming the file that holds no key set; a URL that is down does not keep it from opening
 */
export async function openKeySetVerifier(
  options: Trust & {
    keySet: KeySetSource
    /** Default: threads of its own, for thousands of checks a second. */
    pool?: VerifyPool
    /** Accepted tokens to remember. */
    rememberedMax?: number
    log?: Logger
    random?: () => number
  },
): Promise<KeySetVerifier> {
  const keySet = await openKeySet(options.keySet, {
    log: silentLog(),
    random: Math.random,
    ...options,
  })
  const pool = options.pool ?? createVerifyPool()
  const verifier = createVerifier({ isRevoked: () => false, ...options, keySource: keySet, pool })
  return {
    verify: (token, kind, hints) => verifier.verify(token, kind, hints),
    admit: (token, hints) => verifier.admit(token, hints),
    reload: () => keySet.reload(),
    keySetStatus: () => keySet.status(),
    verifierStats: () => verifier.stats(),
    [Symbol.asyncDispose]: async () => {
      await keySet[Symbol.asyncDispose]()
      await pool[Symbol.asyncDispose]()
    },
  }
}

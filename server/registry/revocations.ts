import type { Logger } from '../../lib/runtime/log.ts'
import type { StateStore } from '../state/state-store.ts'

/** Tokens that no longer count, by `jti`: in memory for the verifier, in the state for the next start. */
export interface Revocations extends AsyncDisposable {
  isRevoked(id: string): boolean
  /** Takes effect at once, and is durable when it returns. */
  revoke(id: string, expiresAt: Date): Promise<void>
}

const prefix = 'deny/'
const pageSize = 1000
const sweepMs = 60 * 60 * 1000

/** Loads the deny list, and follows what others write to it. Entries go when the token would have expired. */
export async function loadRevocations({
  state,
  clockToleranceMs,
  now,
  log,
}: {
  state: StateStore
  /** Tokens are accepted for so long after they expired. */
  clockToleranceMs: number
  now: () => number
  log: Logger
}): Promise<Revocations> {
  const denied = new Map<string, number>()
  const stop = new AbortController()
  const changes = state.watch(prefix, stop.signal)
  for (let after = ''; ;) {
    const page = await state.list(prefix, { after, limit: pageSize })
    for (const { key, value } of page)
      denied.set(key.slice(prefix.length), (value as { expiresAtMs: number }).expiresAtMs)
    after = page.at(-1)?.key ?? ''
    if (page.length < pageSize) break
  }
  const following = (async () => {
    for await (const change of changes) {
      if (change.kind === 'put')
        denied.set(
          change.entry.key.slice(prefix.length),
          (change.entry.value as { expiresAtMs: number }).expiresAtMs,
        )
    }
  })().catch((error: unknown) => {
    log.error({ err: error }, 'the deny list is no longer followed')
  })
  const sweeper = setInterval(() => {
    for (const [id, expiresAtMs] of denied) {
      if (expiresAtMs + clockToleranceMs >= now()) continue
      denied.delete(id)
      state.delete(`${prefix}${id}`).catch((error: unknown) => {
        log.warn({ err: error }, 'an expired entry of the deny list stays')
      })
    }
  }, sweepMs)
  sweeper.unref()
  return {
    isRevoked: (id) => denied.has(id),
    revoke: async (id, expiresAt) => {
      denied.set(id, expiresAt.getTime())
      await state.put(`${prefix}${id}`, { expiresAtMs: expiresAt.getTime() })
    },
    [Symbol.asyncDispose]: async () => {
      clearInterval(sweeper)
      stop.abort()
      await following
    },
  }
}

import { once } from 'node:events'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

/** Between two looks at most. */
const everyMsMax = 50

/**
 * Looks until something is there, or true; often at first, since most is so at once, then seldom, since a look may be a request.
 *
 * @returns what was found
 * @throws Error naming what was not so in time; what a look throws
 */
export async function until<Found>(
  what: string,
  look: () => Found | Promise<Found>,
  { withinMs = 30_000, everyMs }: { readonly withinMs?: number; readonly everyMs?: number } = {},
): Promise<Exclude<Found, false | undefined>> {
  const startedAt = performance.now()
  for (;;) {
    const found = await look()
    if (found !== false && found !== undefined) return found as Exclude<Found, false | undefined>
    const tookMs = performance.now() - startedAt
    if (tookMs > withinMs) throw new Error(`Not so within ${withinMs / 1000} s: ${what}`)
    await sleep(everyMs ?? Math.min(everyMsMax, 1 + tookMs / 10))
  }
}

/** Waits until something takes connections at a port. */
export async function untilListening(port: number, host = '127.0.0.1'): Promise<void> {
  await until(`something listens at ${host} port ${port}`, async () => accepts(port, host))
}

/** Waits until nothing takes connections there any more. */
export async function untilRefused(port: number, host = '127.0.0.1'): Promise<void> {
  await until(`nothing listens at ${host} port ${port}`, async () => !(await accepts(port, host)))
}

async function accepts(port: number, host: string): Promise<boolean> {
  const socket = connect({ port, host, timeout: 1000 })
  socket.once('timeout', () => socket.destroy(new Error('it did not answer')))
  try {
    await once(socket, 'connect')
    return true
  } catch {
    return false
  } finally {
    socket.destroy()
  }
}

import type { ReleaseStatus } from '../lib/client/api.ts'
import { RequestError, UnreachableError } from '../lib/client/http.ts'
import type { ServerClient } from '../lib/client/server-client.ts'
import { delay } from '../lib/runtime/backoff.ts'
import type { Context } from './context.ts'
import { Failure, exitCodes } from './failure.ts'

const pollMs = 1000

/**
 * Polls until a share of the fleet holds a release; a server that is gone for a while is waited for.
 *
 * @throws Failure `timeout`, naming hosts that do not have it; `interrupted` says that the release goes on
 */
export async function waitForFleet(
  wanted: { reference: string; share: number; timeoutMs: number },
  { api, out, now, signal }: Pick<Context, 'out' | 'now' | 'signal'> & { api: ServerClient },
): Promise<ReleaseStatus> {
  const deadlineMs = now() + wanted.timeoutMs
  const percent = `${Math.round(wanted.share * 100)}%`
  let last: ReleaseStatus | undefined
  for (let shown = -1; ;) {
    try {
      last = await api.releaseStatus(wanted.reference)
    } catch (error) {
      const mayPass =
        error instanceof UnreachableError || (error instanceof RequestError && error.status >= 500)
      if (!mayPass || now() > deadlineMs) throw error
      out.progress(`${error.message}; waiting`)
    }
    if (last) {
      const { total, held, failed } = last.fleet
      const line = `${held} of ${total} hosts have it (waiting for ${percent})${failed > 0 ? `, ${failed} failed so far` : ''}`
      out.progress(line)
      if (held !== shown) out.note(line)
      shown = held
      if (total > 0 && held / total >= wanted.share) return last
    }
    if (now() > deadlineMs) throw timedOut(wanted.reference, percent, last)
    try {
      await delay(Math.max(1, Math.min(pollMs, deadlineMs - now() + 1)), signal)
    } catch (error) {
      out.note(
        `The release is published and goes on without this command; look again with: deployctl status ${wanted.reference}`,
      )
      throw error
    }
  }
}

function timedOut(reference: string, percent: string, status: ReleaseStatus | undefined): Failure {
  if (!status || status.fleet.total === 0) {
    return new Failure(
      exitCodes.timeout,
      `Timed out waiting for ${percent} of the fleet: no host follows or fetches ${reference}`,
      {
        hint: 'Add it to `follow` in agent.yaml; `deployctl hosts` shows who is there.',
      },
    )
  }
  const behind = status.hosts.filter(({ held }) => held.state !== 'held')
  const named = behind
    .slice(0, 10)
    .map(({ host, held }) => `${host} (${held.state}${held.reason === undefined ? '' : `: ${held.reason}`})`)
  const more = behind.length > named.length ? ` and ${behind.length - named.length} more` : ''
  return new Failure(
    exitCodes.timeout,
    `Timed out waiting for ${percent} of the fleet: ${status.fleet.held} of ${status.fleet.total} have ${reference}; not ${named.join(', ')}${more}`,
    {
      hint: `The release goes on: deployctl status ${reference} --hosts`,
    },
  )
}

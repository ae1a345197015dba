import type { TestContext } from 'node:test'
import type { Ip } from '../../lib/protocol/address.ts'
import { formatIp } from '../../lib/protocol/address.ts'
import { silentLog } from '../../lib/runtime/log.ts'
import type { TrackerHandlers } from '../../server/tracker/http-connection.ts'
import type { HttpListener, HttpListenerOptions } from '../../server/tracker/http-listener.ts'
import { startHttpListener } from '../../server/tracker/http-listener.ts'

/** What the listener asked the tracker for: `announce a=b 127.0.0.1`. */
export type Asked = string[]

/** A listener on a free port, over a tracker that answers with the query it was asked. */
export async function startListener(
  t: TestContext,
  options: Partial<HttpListenerOptions> = {},
): Promise<{ listener: HttpListener; port: number; asked: Asked }> {
  const asked: Asked = []
  const answer = (action: string) => (query: string, source: Ip) => {
    asked.push(`${action} ${query} ${formatIp(source)}`)
    return Buffer.from(`${action} ${query}`, 'latin1')
  }
  const tracker: TrackerHandlers = { announce: answer('announce'), scrape: answer('scrape') }
  const listener = await startHttpListener({
    host: '127.0.0.1',
    port: 0,
    routes: { announce: ['/announce'], scrape: ['/scrape'] },
    connectionsMax: 1000,
    headTimeoutMs: 60_000,
    idleTimeoutMs: 60_000,
    trustedProxies: [],
    forwardedHeader: 'x-forwarded-for',
    tracker,
    log: silentLog(),
    ...options,
  })
  t.after(() => listener[Symbol.asyncDispose]())
  return { listener, port: listener.address.port, asked }
}

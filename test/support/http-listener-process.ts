// A listener in a process of its own, for tests of its limits. Prints its port.
import { createLog } from '../../lib/runtime/log.ts'
import { startHttpListener } from '../../server/tracker/http-listener.ts'

const answer = () => Buffer.from('d8:intervali60e5:peers0:e')
const listener = await startHttpListener({
  host: '127.0.0.1',
  port: 0,
  routes: { announce: ['/announce'], scrape: ['/scrape'] },
  connectionsMax: 10_000,
  headTimeoutMs: 60_000,
  idleTimeoutMs: 60_000,
  trustedProxies: [],
  forwardedHeader: 'x-forwarded-for',
  tracker: { announce: answer, scrape: answer },
  log: createLog('listener', 'silent'),
})
process.stdout.write(`${listener.address.port}\n`)

// A tracker inside a program: node embed.js [COMPLETIONS_FILE]. Prints where it listens as a line of JSON, and ends in order at SIGINT
// and SIGTERM.
import { ConfigError, startTracker } from 'rackswarm'
import createPortsAndDrains from './hook.js'
import createCompletionsLog from './post-hook.js'
import createMapStore from './store.js'

const [file = 'completions.jsonl'] = process.argv.slice(2)

try {
  await using tracker = await startTracker(
    {
      http: { addr: '127.0.0.1:0' },
      udp: { addr: '127.0.0.1:0' },
      tracker: { approval: 'none' },
    },
    {
      hooks: [(deps) => createPortsAndDrains({ drained: ['127.0.0.9'] }, deps)],
      postHooks: [(deps) => createCompletionsLog({ file }, deps)],
      store: (deps) => createMapStore({ peers_max: 50_000 }, deps),
    },
  )
  console.log(JSON.stringify(tracker.addresses))
  await new Promise((resolve) => process.once('SIGINT', resolve).once('SIGTERM', resolve))
} catch (error) {
  console.error(error instanceof ConfigError ? error.message : error)
  process.exitCode = 1
}

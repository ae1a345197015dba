// Loaded into each process that runs a test file: one that does not end says so, where the runner would wait for it for ever.
import { isMainThread } from 'node:worker_threads'

const endsWithinMs = 300_000

if (isMainThread)
  setTimeout(() => {
    const kept = [...new Set(process.getActiveResourcesInfo())].join(', ')
    process.stderr.write(
      `${process.argv[1] ?? ''} has not ended within ${endsWithinMs / 1000} s; what keeps it: ${kept}\n`,
    )
    process.exit(1)
  }, endsWithinMs).unref()

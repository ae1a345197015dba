// A hook of the tracker, for the fault `tracker_away` of bench/swarm.ts: while a file is there, announces get no answer, and all else goes on.
import { existsSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import type { PreHook } from '../../server/tracker/hooks.ts'

const lookEveryMs = 50

export default function ({ file }: { file: string }): PreHook {
  return {
    name: 'silence',
    announce: () => (existsSync(file) ? untilGone(file) : undefined),
  }
}

async function untilGone(file: string): Promise<void> {
  while (existsSync(file)) await sleep(lookEveryMs)
}

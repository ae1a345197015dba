// Programs whose clock is wrong, by Debian's faketime.
import { globSync } from 'node:fs'
import { installTools } from './tools.ts'

/**
 * The environment for a program that takes it to be `seconds` later than it is, or earlier. What is measured by the monotonic clock, timers
 * included, is as it was: a machine with a wrong date is no machine that runs fast.
 */
export function withClockOff(
  seconds: number,
  environment: NodeJS.ProcessEnv = process.env,
): NodeJS.ProcessEnv {
  installTools(['faketime'])
  const [library] = globSync('/usr/lib/*/faketime/libfaketimeMT.so.1')
  if (library === undefined) throw new Error('Debian’s faketime has no libfaketimeMT.so.1 below /usr/lib')
  return {
    ...environment,
    LD_PRELOAD: library,
    FAKETIME: `${seconds < 0 ? '' : '+'}${seconds}s`,
    FAKETIME_DONT_FAKE_MONOTONIC: '1',
    FAKETIME_DONT_RESET: '1',
  }
}

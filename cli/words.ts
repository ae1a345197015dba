import { duration } from '../lib/runtime/config.ts'
import { Failure, exitCodes } from './failure.ts'

/** `10m` as milliseconds. @throws Failure */
export function parseDurationMs(text: string): number {
  const parsed = duration().safeParse(text)
  if (parsed.success) return parsed.data
  throw new Failure(
    exitCodes.usage,
    `Cannot use duration ${JSON.stringify(text)}: need a number and a unit such as 30s, 10m or 12h`,
  )
}

/** `95%` as 0.95. @throws Failure */
export function parseShare(text: string): number {
  const match = /^(\d{1,3}(?:\.\d+)?)%$/.exec(text)
  const share = Number(match?.[1]) / 100
  if (match && share > 0 && share <= 1) return share
  throw new Failure(
    exitCodes.usage,
    `Cannot use share ${JSON.stringify(text)}: need a percentage such as 95%`,
  )
}

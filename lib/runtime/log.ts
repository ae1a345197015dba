import type { Logger } from 'pino'
import { destination, pino } from 'pino'

export type { Logger } from 'pino'
export type LogLevel = 'trace' | 'debug' | 'info' | 'warn' | 'error' | 'fatal' | 'silent'

/**
 * JSON lines on stderr. Fields that could hold a secret are cut by name, and no caller logs a URL: announce and
 * webseed URLs carry tokens.
 */
export function createLog(program: string, level: LogLevel = 'info'): Logger {
  return pino(
    {
      level,
      base: { program, pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      redact: {
        paths: ['jwt', 'token', 'authorization', '*.jwt', '*.token', '*.authorization'],
        censor: '[secret]',
      },
    },
    destination({ fd: 2, sync: true }),
  )
}

/** For tests and for parts that must say nothing. */
export function silentLog(): Logger {
  return pino({ level: 'silent' })
}

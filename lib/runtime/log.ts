import type { Logger as Pino } from 'pino'
import { destination, pino } from 'pino'

/** What parts log to. A pino logger is one. */
export interface Logger {
  /** The least severe level that is written. */
  readonly level: string
  isLevelEnabled(level: string): boolean
  trace: LogLine
  debug: LogLine
  info: LogLine
  warn: LogLine
  error: LogLine
  fatal: LogLine
}

/** Takes variables as fields, an error among them as `err`, and a constant phrase. */
export interface LogLine {
  (fields: object, message: string): void
  (message: string): void
}

export type LogLevel = 'trace' | 'debug' | 'info' | 'warn' | 'error' | 'fatal' | 'silent'

/**
 * JSON lines on stderr. Fields that could hold a secret are cut by name, and no caller logs a URL: announce and
 * webseed URLs carry tokens.
 */
export function createLog(program: string, level: LogLevel = 'info'): Pino {
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

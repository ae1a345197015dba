import { styleText } from 'node:util'

/** Where a command writes: results on stdout, everything else on stderr. */
export interface Output {
  readonly json: boolean
  /** One result; `human` writes it for a person, and JSON stands for it with --json. */
  result(value: unknown, human: () => string): void
  /** Something was done that yields nothing to print: JSON says so, a person is told on stderr. */
  done(value: unknown, text: string): void
  /** For the person who waits; silent with --quiet. */
  note(text: string): void
  /** Coloured on stdout, if a person reads it there and wants colour. */
  readonly paint: (colour: 'green' | 'yellow' | 'red', text: string) => string
  /** A line that is drawn over, where stderr is a terminal; elsewhere nothing. */
  progress(text: string): void
  table(header: readonly string[], rows: readonly (readonly string[])[]): string
}

export interface Stream {
  readonly isTTY?: boolean
  readonly columns?: number
  write(text: string): unknown
}

/** Colour, widths and progress only for a terminal; NO_COLOR, FORCE_COLOR, CLICOLOR_FORCE, CI and TERM=dumb are heeded. */
export function createOutput(options: {
  stdout: Stream
  stderr: Stream
  env: NodeJS.ProcessEnv
  json: boolean
  quiet: boolean
  /** False for --no-color. */
  colour: boolean
}): Output {
  const { stdout, stderr, env, json, quiet } = options
  const live = stderr.isTTY === true && env['TERM'] !== 'dumb' && !env['CI'] && !quiet
  const forced = ['FORCE_COLOR', 'CLICOLOR_FORCE'].some(
    (name) => env[name] !== undefined && env[name] !== '' && env[name] !== '0',
  )
  const colours =
    options.colour && !env['NO_COLOR'] && (forced || (stdout.isTTY === true && env['TERM'] !== 'dumb'))
  let drawn = false
  const clear = () => {
    if (drawn) stderr.write('\r\u001B[2K')
    drawn = false
  }
  const note = (text: string) => {
    clear()
    if (!quiet) stderr.write(`${text}\n`)
  }
  return {
    json,
    result: (value, human) => {
      clear()
      stdout.write(json ? `${JSON.stringify(value)}\n` : human())
    },
    done: (value, text) => {
      clear()
      if (json) stdout.write(`${JSON.stringify(value)}\n`)
      else note(text)
    },
    note,
    paint: (colour, text) => (colours ? styleText(colour, text, { validateStream: false }) : text),
    progress: (text) => {
      if (!live) return
      clear()
      stderr.write(text.slice(0, Math.max(20, (stderr.columns ?? 80) - 1)))
      drawn = true
    },
    table: (header, rows) => {
      // A pipe gets tabs and no header: made for cut and awk.
      if (stdout.isTTY !== true) return rows.map((row) => `${row.join('\t')}\n`).join('')
      const all = [header, ...rows]
      const widths = header.map((_, column) => Math.max(...all.map((row) => row[column]?.length ?? 0)))
      return all
        .map(
          (row) =>
            `${row
              .map((cell, column) => cell.padEnd(widths[column] ?? 0))
              .join('  ')
              .trimEnd()}\n`,
        )
        .join('')
    },
  }
}

/** `12.3 MiB`. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  const power = Math.min(units.length - 1, bytes < 1 ? 0 : Math.floor(Math.log2(bytes) / 10))
  const value = bytes / 2 ** (10 * power)
  return `${power === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[power] ?? ''}`
}

/** `4.2 s`, `3m 05s`. */
export function formatDuration(ms: number): string {
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`
  const seconds = Math.round(ms / 1000)
  return `${Math.floor(seconds / 60)}m ${String(seconds % 60).padStart(2, '0')}s`
}

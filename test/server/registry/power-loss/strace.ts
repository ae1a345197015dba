// What a traced process did to files, read from `strace -f -y -xx`.

/** One step of a process, in the order in which it took effect. Paths are those that strace names: of the moment of the call. */
export type Step =
  | { readonly kind: 'create' | 'mkdir' | 'remove' | 'sync'; readonly path: string }
  | { readonly kind: 'rename'; readonly from: string; readonly to: string }
  /** `at` undefined appends. */
  | { readonly kind: 'write'; readonly path: string; readonly at: number | undefined; readonly bytes: Buffer }
  | { readonly kind: 'truncate'; readonly path: string; readonly length: number }
  /** Something was sent to a socket. */
  | { readonly kind: 'send'; readonly bytes: Buffer }
  /** A call that this knows no more of than what it was made on. */
  | { readonly kind: 'other'; readonly call: string; readonly paths: readonly string[] }

/** System calls to trace: all that Node changes files with. */
export const tracedCalls = [
  ...['openat', 'open', 'creat', 'write', 'pwrite64', 'writev', 'pwritev', 'pwritev2'],
  ...['rename', 'renameat', 'renameat2', 'link', 'linkat', 'symlink', 'symlinkat'],
  ...['unlink', 'unlinkat', 'rmdir', 'mkdir', 'mkdirat', 'ftruncate', 'truncate', 'fallocate'],
  ...['fsync', 'fdatasync', 'sync_file_range', 'copy_file_range', 'sendfile', 'sendmsg'],
]

/**
 * Reads the output of strace. A sync counts from where it began, everything else from where it ended: of two calls that overlap,
 * nothing is taken to be on disk that need not be.
 *
 * @throws Error for data that strace has cut
 */
export function parseTrace(text: string): Step[] {
  const steps: (Step | undefined)[] = []
  const pending = new Map<string, { head: string; place: number }>()
  for (const line of text.split('\n')) {
    const match = /^(?<pid>\d+)\s+(?<rest>.*)$/.exec(line)
    const { pid = '', rest = '' } = match?.groups ?? {}
    const resumed = /^<\.\.\. \w+ resumed>(?<tail>.*)$/.exec(rest)?.groups?.['tail']
    if (rest.endsWith('<unfinished ...>')) {
      const head = rest.slice(0, -'<unfinished ...>'.length).trimEnd()
      const early = /^(fsync|fdatasync)\(/.test(head)
      pending.set(pid, { head, place: early ? steps.push(undefined) - 1 : -1 })
    } else if (resumed !== undefined) {
      const begun = pending.get(pid)
      pending.delete(pid)
      if (!begun) continue
      const its = stepsOf(begun.head + resumed)
      if (begun.place >= 0) steps[begun.place] = its[0]
      else steps.push(...its)
    } else {
      steps.push(...stepsOf(rest))
    }
  }
  return steps.filter((step) => step !== undefined)
}

function stepsOf(call: string): Step[] {
  const parsed = /^(?<name>\w+)\((?<args>.*)\)\s+= (?<result>.*)$/s.exec(call)?.groups
  if (!parsed) return []
  const { name = '', args: argsText = '', result = '' } = parsed
  if (result.startsWith('-1') || result.startsWith('?')) return []
  const args = splitArguments(argsText)
  const arg = (i: number) => args[i] ?? ''
  switch (name) {
    case 'open':
    case 'creat':
    case 'openat': {
      const flags = name === 'open' ? arg(1) : name === 'creat' ? 'O_CREAT|O_TRUNC' : arg(2)
      const path = pathOfDescriptor(result)
      if (path === undefined) return []
      return [
        ...(flags.includes('O_CREAT') ? [{ kind: 'create' as const, path }] : []),
        ...(flags.includes('O_TRUNC') ? [{ kind: 'truncate' as const, path, length: 0 }] : []),
      ]
    }
    case 'write':
    case 'writev':
    case 'sendmsg':
      return written(arg(0), arg(1), undefined, Number.parseInt(result))
    case 'pwrite64':
    case 'pwritev':
    case 'pwritev2':
      return written(arg(0), arg(1), Number(arg(3)), Number.parseInt(result))
    case 'rename':
      return [{ kind: 'rename', from: pathOf('', arg(0)), to: pathOf('', arg(1)) }]
    case 'renameat':
    case 'renameat2':
      return [{ kind: 'rename', from: pathOf(arg(0), arg(1)), to: pathOf(arg(2), arg(3)) }]
    case 'unlink':
    case 'rmdir':
      return [{ kind: 'remove', path: pathOf('', arg(0)) }]
    case 'unlinkat':
      return [{ kind: 'remove', path: pathOf(arg(0), arg(1)) }]
    case 'mkdir':
      return [{ kind: 'mkdir', path: pathOf('', arg(0)) }]
    case 'mkdirat':
      return [{ kind: 'mkdir', path: pathOf(arg(0), arg(1)) }]
    case 'ftruncate':
    case 'truncate': {
      const path = name === 'truncate' ? pathOf('', arg(0)) : pathOfDescriptor(arg(0))
      return path === undefined ? [] : [{ kind: 'truncate', path, length: Number(arg(1)) }]
    }
    case 'fsync':
    case 'fdatasync': {
      const path = pathOfDescriptor(arg(0))
      return path === undefined ? [] : [{ kind: 'sync', path }]
    }
    default:
      return [
        { kind: 'other', call: name, paths: args.map((text) => pathOfDescriptor(text) ?? pathOf('', text)) },
      ]
  }
}

function written(descriptor: string, data: string, at: number | undefined, count: number): Step[] {
  const name = nameOfDescriptor(descriptor)
  if (name === undefined) return []
  const isSocket = /^(socket|TCP|TCPv6|UNIX)/.test(name)
  if (!isSocket && !name.startsWith('/')) return []
  const strings = [...data.matchAll(/"((?:[^"\\]|\\.)*)"(\.\.\.)?/g)]
  const bytes = Buffer.concat(strings.map(([, text = '']) => unescape(text))).subarray(0, count)
  if (isSocket) return [{ kind: 'send', bytes }]
  if (strings.some(([, , cut]) => cut !== undefined) || bytes.length !== count)
    throw new Error(`strace has cut what was written to ${name}: ${bytes.length} of ${count} bytes`)
  return [{ kind: 'write', path: name, at, bytes }]
}

/** An absolute path, or one that is relative to the directory of a descriptor. */
function pathOf(directory: string, quoted: string): string {
  const path = unescape(/^"(.*)"$/s.exec(quoted)?.[1] ?? '').toString()
  return path.startsWith('/') ? path : `${nameOfDescriptor(directory) ?? ''}/${path}`
}

function pathOfDescriptor(text: string): string | undefined {
  const name = nameOfDescriptor(text)
  return name?.startsWith('/') === true ? name : undefined
}

/** `3</tmp/a>` → `/tmp/a`; what is deleted has no name. */
function nameOfDescriptor(text: string): string | undefined {
  const match = /^(?:\d+|AT_FDCWD)<(?<name>.*)>(?<deleted>\(deleted\))?$/s.exec(text.trim())?.groups
  return match?.['deleted'] === undefined ? match && unescape(match['name'] ?? '').toString() : undefined
}

/** At the commas that are not inside of strings, brackets or names of descriptors. */
function splitArguments(text: string): string[] {
  const parts: string[] = []
  let depth = 0
  let quoted = false
  let from = 0
  for (let i = 0; i < text.length; i++) {
    const character = text[i] ?? ''
    if (quoted) {
      if (character === '\\') i++
      else if (character === '"') quoted = false
    } else if (character === '"') quoted = true
    else if ('[{(<'.includes(character)) depth++
    else if (']})>'.includes(character)) depth--
    else if (character === ',' && depth === 0) {
      parts.push(text.slice(from, i).trim())
      from = i + 1
    }
  }
  return [...parts, text.slice(from).trim()]
}

const letters: Readonly<Record<string, number>> = { n: 10, t: 9, v: 11, f: 12, r: 13, a: 7, b: 8 }

/** C escapes: `\x2f`, octal, letters. */
function unescape(text: string): Buffer {
  if (/^(?:\\x[0-9a-f]{2})*$/.test(text)) return Buffer.from(text.replaceAll('\\x', ''), 'hex')
  const bytes: number[] = []
  for (const [whole, hex, octal, letter] of text.matchAll(/\\x([0-9a-f]{2})|\\([0-7]{1,3})|\\(.)|[^\\]/gs)) {
    if (hex !== undefined) bytes.push(Number.parseInt(hex, 16))
    else if (octal !== undefined) bytes.push(Number.parseInt(octal, 8))
    else if (letter !== undefined) bytes.push(letters[letter] ?? letter.charCodeAt(0))
    else bytes.push(...Buffer.from(whole))
  }
  return Buffer.from(bytes)
}

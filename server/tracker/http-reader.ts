import { METHODS } from 'node:http'

/**
 * The head of one request. Only requests without a body are read, so a head is a whole request (RFC 9112). Texts are latin1:
 * one character a byte.
 */
export interface HttpRequest {
  readonly kind: 'request'
  readonly method: string
  /** The target up to its `?`; without scheme and authority where it had them. Not decoded. */
  readonly path: string
  /** What follows the first `?`; not decoded. */
  readonly query: string
  /** 1 for HTTP/1.1, 0 for HTTP/1.0. */
  readonly minorVersion: 0 | 1
  readonly keepAlive: boolean
  /** The values of the header that was asked for, joined with commas. */
  readonly forwarded: string | undefined
}

/** Why bytes are not a request that is answered. The connection must be closed: what follows has no beginning. */
export interface HttpRefusal {
  readonly kind: 'refusal'
  readonly status: 400 | 413 | 431
  readonly reason: RefusalReason
  readonly message: string
}

export type RefusalReason = keyof typeof refusals

/** The most bytes of a head, empty lines before it and the one that ends it included; node:http's number. */
export const headBytesMax = 16 * 1024

const refusals = {
  head_too_large: { status: 431, message: `the head is larger than ${headBytesMax} bytes` },
  body: { status: 413, message: 'requests with a body are not taken' },
  method: { status: 400, message: 'need a method and one space' },
  target: { status: 400, message: 'need a target of visible ASCII and one space' },
  version: { status: 400, message: 'need HTTP/1.1 or HTTP/1.0' },
  line_end: { status: 400, message: 'lines end with CR LF, and neither stands alone' },
  field: { status: 400, message: 'a header line is a name, a colon and a value, on one line' },
  content_length: { status: 400, message: 'need one Content-Length of digits' },
  framing: { status: 400, message: 'Content-Length and Transfer-Encoding exclude each other' },
  host_missing: { status: 400, message: 'the Host header is missing' },
  host_twice: { status: 400, message: 'the Host header is there twice' },
} as const

/**
 * Finds requests in the bytes of one connection: `push` what came, then call `next` until it has nothing. After a refusal there is
 * nothing more to read.
 *
 * Strict where a proxy in front could see other requests than we do (request smuggling): whatever node:http refuses is
 * refused, and http-differential.test.ts lists what is refused beyond that.
 */
export class HttpReader {
  #bytes: Buffer = nothing
  #start = 0
  /** So many bytes of an unfinished head have been looked at. */
  #seen = 0

  push(chunk: Buffer): void {
    this.#bytes = this.held === 0 ? chunk : Buffer.concat([this.#bytes.subarray(this.#start), chunk])
    this.#start = 0
  }

  /** Bytes pushed that are not part of a request yet. */
  get held(): number {
    return this.#bytes.length - this.#start
  }

  /** Nothing is held, or only empty lines, which may follow a request. */
  get blank(): boolean {
    return this.held === 0 || this.#bytes.subarray(this.#start).every((byte) => byte === cr || byte === lf)
  }

  /** `forwardedName`: a header whose value is wanted, in lower case. */
  next(forwardedName?: string): HttpRequest | HttpRefusal | undefined {
    if (this.held <= this.#seen || (this.#seen > 0 && !this.#isDecided())) return undefined
    const head = readHead(this.#bytes, this.#start, forwardedName)
    if (head === undefined) {
      this.#seen = this.held
    } else if (head.kind === 'request') {
      this.#seen = 0
      this.#start = head.end
      // An idle connection keeps no chunk.
      if (head.end === this.#bytes.length) {
        this.#bytes = nothing
        this.#start = 0
      }
    }
    return head
  }

  /**
   * Whether bytes that came after a first look complete the head or spoil it. Reading from the start at each of 16,000 packets
   * of one byte would take 16,000 times 16,000 steps; this looks at each byte once.
   */
  #isDecided(): boolean {
    const bytes = this.#bytes
    const from = this.#start + this.#seen
    this.#seen = this.held
    if (this.held >= headBytesMax) return true
    for (let i = from; i < bytes.length; i++) {
      const byte = bytes[i] ?? 0
      if (byte === lf) {
        if (bytes[i - 1] !== cr || bytes[i - 2] === lf) return true
      } else if (bytes[i - 1] === cr || (byte !== cr && !is(byte, valueByte))) {
        return true
      }
    }
    return false
  }
}

const nothing = Buffer.alloc(0)

const cr = 13
const lf = 10
const space = 32
const tab = 9
const colon = 58
const question = 63
const slash = 47

const tokenByte = 1
const targetByte = 2
const valueByte = 4
const byteClasses = classifyBytes()

interface Head extends HttpRequest {
  /** The offset after the head. */
  readonly end: number
}

/** What the header lines said that decides something. */
interface Fields {
  hosts: number
  contentLengths: number
  contentLengthBroken: boolean
  bodyAnnounced: boolean
  transferEncoding: boolean
  close: boolean
  keepAlive: boolean
  forwarded: string | undefined
}

const tooLarge = refuse('head_too_large')

/** Reads the head that starts at `start`; undefined where it is good so far and not all there. */
function readHead(
  bytes: Buffer,
  start: number,
  forwardedName: string | undefined,
): Head | HttpRefusal | undefined {
  const limit = Math.min(bytes.length, start + headBytesMax)
  const unfinished = limit === start + headBytesMax ? tooLarge : undefined
  let i = start
  // Empty lines before a request are skipped (RFC 9112 section 2.2).
  while (bytes[i] === cr && i + 1 < limit) {
    if (bytes[i + 1] !== lf) return refuse('line_end')
    i += 2
  }
  if (bytes[i] === lf) return refuse('line_end')

  const methodStart = i
  while (i < limit && is(bytes[i], tokenByte)) i++
  if (i >= limit) return unfinished
  if (bytes[i] === cr && i === methodStart) return unfinished
  const method = isGet(bytes, methodStart, i) ? 'GET' : bytes.toString('latin1', methodStart, i)
  if (bytes[i] !== space || (method !== 'GET' && !methods.has(method))) return refuse('method')
  i++

  const targetStart = i
  while (i < limit && bytes[i] !== question && is(bytes[i], targetByte)) i++
  const pathEnd = i
  while (i < limit && is(bytes[i], targetByte)) i++
  if (i >= limit) return unfinished
  const targetEnd = i
  const pathStart = bytes[targetStart] === slash ? targetStart : afterAuthority(bytes, targetStart, pathEnd)
  if (bytes[i] !== space || pathStart === undefined) return refuse('target')
  i++

  for (let k = 0; k < versionStart.length; k++, i++) {
    if (i >= limit) return unfinished
    if (bytes[i] !== versionStart[k]) return refuse('version')
  }
  if (i >= limit) return unfinished
  const minorVersion = bytes[i] === 0x31 ? 1 : 0
  if (minorVersion === 0 && bytes[i] !== 0x30) return refuse('version')
  i++
  if (i < limit && bytes[i] !== cr) return refuse('version')
  if (i + 1 >= limit) return unfinished
  if (bytes[i + 1] !== lf) return refuse('line_end')
  i += 2

  const fields: Fields = {
    hosts: 0,
    contentLengths: 0,
    contentLengthBroken: false,
    bodyAnnounced: false,
    transferEncoding: false,
    close: false,
    keepAlive: false,
    forwarded: undefined,
  }
  while (bytes[i] !== cr) {
    const nameStart = i
    while (i < limit && is(bytes[i], tokenByte)) i++
    if (i >= limit) return unfinished
    const nameEnd = i
    if (bytes[i] !== colon || nameEnd === nameStart) return refuse('field')
    i++
    while (i < limit && (bytes[i] === space || bytes[i] === tab)) i++
    const valueStart = i
    while (i < limit && is(bytes[i], valueByte)) i++
    if (i < limit && bytes[i] !== cr) return refuse(bytes[i] === lf ? 'line_end' : 'field')
    if (i + 1 >= limit) return unfinished
    if (bytes[i + 1] !== lf) return refuse('line_end')
    noteField(fields, bytes, nameStart, nameEnd, valueStart, i, forwardedName)
    i += 2
    if (i >= limit) return unfinished
  }
  if (i + 1 >= limit) return unfinished
  if (bytes[i + 1] !== lf) return refuse('line_end')

  const wrong = judgeFields(fields, minorVersion)
  if (wrong !== undefined) return refuse(wrong)
  return {
    kind: 'request',
    method,
    path: pathStart === pathEnd ? '/' : bytes.toString('latin1', pathStart, pathEnd),
    query: pathEnd === targetEnd ? '' : bytes.toString('latin1', pathEnd + 1, targetEnd),
    minorVersion,
    keepAlive: !fields.close && (minorVersion === 1 || fields.keepAlive),
    forwarded: fields.forwarded,
    end: i + 2,
  }
}

const versionStart = Buffer.from('HTTP/1.')
/** CONNECT is left out: what follows it is not HTTP. */
const methods: ReadonlySet<string> = new Set(METHODS.filter((method) => method !== 'CONNECT'))

function isGet(bytes: Buffer, start: number, end: number): boolean {
  return end - start === 3 && bytes[start] === 0x47 && bytes[start + 1] === 0x45 && bytes[start + 2] === 0x54
}

/** `http://host:6969/announce`: where the path starts, RFC 9112 section 3.2.2. Undefined if it is no such target. */
function afterAuthority(bytes: Buffer, start: number, end: number): number | undefined {
  const text = bytes.toString('latin1', start, end)
  if (text === '*') return start
  const match = /^https?:\/\/[A-Za-z0-9._:[\]-]+(?=\/|$)/i.exec(text)
  return match ? start + match[0].length : undefined
}

/** Remembers what a header line says, if it is one that decides something. Most lines are told apart by their length. */
function noteField(
  fields: Fields,
  bytes: Buffer,
  nameStart: number,
  nameEnd: number,
  valueStart: number,
  valueEnd: number,
  forwardedName: string | undefined,
): void {
  switch (nameEnd - nameStart) {
    case 4:
      if (isName(bytes, nameStart, 'host')) fields.hosts++
      break
    case 10:
      if (isName(bytes, nameStart, 'connection')) noteConnection(fields, bytes, valueStart, valueEnd)
      break
    case 14:
      if (isName(bytes, nameStart, 'content-length')) noteContentLength(fields, bytes, valueStart, valueEnd)
      break
    case 16:
      // Not a standard one, but node:http obeys it.
      if (isName(bytes, nameStart, 'proxy-connection')) noteConnection(fields, bytes, valueStart, valueEnd)
      break
    case 17:
      if (isName(bytes, nameStart, 'transfer-encoding')) fields.transferEncoding = true
      break
  }
  if (forwardedName?.length === nameEnd - nameStart && isName(bytes, nameStart, forwardedName)) {
    const value = bytes.toString('latin1', valueStart, valueEnd)
    fields.forwarded = fields.forwarded === undefined ? value : `${fields.forwarded},${value}`
  }
}

/** `name` in lower case; setting bit 5 lowers a letter, and leaves the hyphen. */
function isName(bytes: Buffer, start: number, name: string): boolean {
  for (let k = 0; k < name.length; k++) {
    if (((bytes[start + k] ?? 0) | 0x20) !== name.charCodeAt(k)) return false
  }
  return true
}

/** After a request that offers an upgrade the client may speak something else, so that closes too. */
function noteConnection(fields: Fields, bytes: Buffer, start: number, end: number): void {
  if (end - start === 5 && isName(bytes, start, 'close')) {
    fields.close = true
    return
  }
  for (const word of bytes.toString('latin1', start, end).toLowerCase().split(',')) {
    const option = word.replace(/^[ \t]+|[ \t]+$/g, '')
    if (option === 'close' || option === 'upgrade') fields.close = true
    if (option === 'keep-alive') fields.keepAlive = true
  }
}

function noteContentLength(fields: Fields, bytes: Buffer, start: number, end: number): void {
  const value = bytes.toString('latin1', start, end).replace(/[ \t]+$/, '')
  fields.contentLengths++
  if (!/^\d+$/.test(value)) fields.contentLengthBroken = true
  if (/[1-9]/.test(value)) fields.bodyAnnounced = true
}

function judgeFields(fields: Fields, minorVersion: 0 | 1): RefusalReason | undefined {
  if (fields.contentLengths > 1 || fields.contentLengthBroken) return 'content_length'
  if (fields.contentLengths > 0 && fields.transferEncoding) return 'framing'
  if (fields.bodyAnnounced || fields.transferEncoding) return 'body'
  if (fields.hosts === 0 && minorVersion === 1) return 'host_missing'
  if (fields.hosts > 1) return 'host_twice'
  return undefined
}

function refuse(reason: RefusalReason): HttpRefusal {
  const { status, message } = refusals[reason]
  return { kind: 'refusal', status, reason, message }
}

function is(byte: number | undefined, kind: number): boolean {
  return ((byteClasses[byte ?? 0] ?? 0) & kind) !== 0
}

/** RFC 9110 section 5.6.2 (token), RFC 9112 section 3.2 (visible ASCII), RFC 9110 section 5.5 (field values). */
function classifyBytes(): Uint8Array {
  return Uint8Array.from({ length: 256 }, (_, byte) => {
    const visible = byte > space && byte < 127
    const token = visible && /[\w!#$%&'*+.^`|~-]/.test(String.fromCharCode(byte))
    const value = visible || byte === space || byte === tab || byte > 127
    return (token ? tokenByte : 0) | (visible ? targetByte : 0) | (value ? valueByte : 0)
  })
}

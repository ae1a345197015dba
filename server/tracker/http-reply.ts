/** A short answer in words: everything but a tracker's reply. */
export interface TextAnswer {
  readonly status: 400 | 404 | 405 | 408 | 413 | 431 | 500
  readonly text: string
}

/** What of a request decides the form of its reply. */
export interface ReplyTo {
  readonly method: string
  readonly minorVersion: 0 | 1
}

/** Writes a whole HTTP/1.1 reply into one buffer. A tracker's bytes go out as 200; HEAD gets no body. */
export function writeReply(answer: Buffer | TextAnswer, to: ReplyTo, closing: boolean): Buffer {
  return answer instanceof Uint8Array ? writeOk(answer, to, closing) : writeText(answer, to, closing)
}

function writeOk(body: Buffer, { minorVersion }: ReplyTo, closing: boolean): Buffer {
  const start = closing ? okStarts.closing : minorVersion === 0 ? okStarts.keepAlive : okStarts.plain
  const lengthLine = `${body.length}\r\n\r\n`
  const reply = Buffer.allocUnsafe(start.length + lengthLine.length + body.length)
  reply.set(start)
  reply.write(lengthLine, start.length, 'latin1')
  reply.set(body, start.length + lengthLine.length)
  return reply
}

const okStarts = {
  plain: okStart(''),
  closing: okStart('connection: close\r\n'),
  keepAlive: okStart('connection: keep-alive\r\n'),
}

function okStart(connection: string): Buffer {
  return Buffer.from(`HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n${connection}content-length: `)
}

const reasons: Record<TextAnswer['status'], string> = {
  400: 'Bad Request',
  404: 'Not Found',
  405: 'Method Not Allowed',
  408: 'Request Timeout',
  413: 'Content Too Large',
  431: 'Request Header Fields Too Large',
  500: 'Internal Server Error',
}

function writeText(
  { status, text }: TextAnswer,
  { method, minorVersion }: ReplyTo,
  closing: boolean,
): Buffer {
  const body = `${text}\n`
  const lines = [
    `HTTP/1.1 ${status} ${reasons[status]}`,
    'content-type: text/plain',
    `content-length: ${Buffer.byteLength(body)}`,
  ]
  if (status === 405) lines.push('allow: GET')
  if (closing) lines.push('connection: close')
  else if (minorVersion === 0) lines.push('connection: keep-alive')
  return Buffer.from(`${lines.join('\r\n')}\r\n\r\n${method === 'HEAD' ? '' : body}`)
}

import { AgentStatus, FetchEvent, TransferList } from './api.ts'
import { UnreachableError, createHttpClient } from './http.ts'

/** The agent of this host, on its unix socket. Calls reject with RequestError or UnreachableError. */
export interface AgentClient extends AsyncDisposable {
  status(): Promise<AgentStatus>
  transfers(): Promise<TransferList>
  /** Has the agent fetch a release; the last event is `done` or `error`. */
  fetch(reference: string, signal?: AbortSignal): AsyncIterable<FetchEvent>
  pin(reference: string): Promise<void>
  unpin(reference: string): Promise<void>
}

export function createAgentClient({ socketPath }: { socketPath: string }): AgentClient {
  // A fetch reports at least every second; one that waits says that, too.
  const http = createHttpClient({ baseUrl: 'http://agent', socketPath, idleTimeoutMs: 60_000 })
  const change = async (method: 'PUT' | 'DELETE', reference: string) => {
    await (await http.ok({ method, path: `/v1/pins/${encodeURIComponent(reference)}` })).discard()
  }
  return {
    status: () => http.json(AgentStatus, { path: '/v1/status' }),
    transfers: () => http.json(TransferList, { path: '/v1/transfers' }),
    async *fetch(reference, signal) {
      const answer = await http.ok({
        method: 'POST',
        path: '/v1/fetch',
        body: JSON.stringify({ reference }),
        headers: { 'content-type': 'application/json' },
        signal,
      })
      for await (const line of linesOf(answer.stream)) {
        const event = FetchEvent.safeParse(JSON.parse(line))
        if (!event.success)
          throw new UnreachableError(`Cannot understand ${socketPath}: is it an agent of this version?`)
        yield event.data
      }
    },
    pin: (reference) => change('PUT', reference),
    unpin: (reference) => change('DELETE', reference),
    [Symbol.asyncDispose]: () => http[Symbol.asyncDispose](),
  }
}

/** Whoever stops in the middle ends the stream, and hears no more of it. */
async function* linesOf(stream: AsyncIterable<Uint8Array>): AsyncGenerator<string> {
  const decoder = new TextDecoder()
  let held = ''
  for await (const part of stream) {
    const lines = (held + decoder.decode(part, { stream: true })).split('\n')
    held = lines.pop() ?? ''
    yield* lines
  }
  if (held !== '') yield held
}

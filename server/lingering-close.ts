import type { Server as HttpServer, IncomingMessage } from 'node:http'
import type { Socket } from 'node:net'

/** How long the rest of a refused body is read. A client that has not read its answer by then is not going to. */
const lingerMs = 5_000

/**
 * Lets clients read why they were refused (RFC 9112 section 9.6). A connection that is closed with bytes unread is reset, and a
 * reset throws away the answer that the client has not read yet: of an upload that is too large, or that it may not
 * make, it would see a broken pipe. So only our half is closed, and what still comes is dropped, for `lingerMs` at most.
 */
export function lingerOnClose(server: HttpServer): void {
  const latest = new WeakMap<Socket, IncomingMessage>()
  server.on('request', (request: IncomingMessage) => {
    const { socket } = request
    const known = latest.has(socket)
    latest.set(socket, request)
    if (known) return
    // What node:http calls after the last answer on a connection.
    const closeAtOnce = socket.destroySoon.bind(socket)
    socket.destroySoon = () => {
      const last = latest.get(socket)
      if (last === undefined || last.complete) {
        closeAtOnce()
        return
      }
      socket.end()
      last.resume()
      const timer = setTimeout(() => socket.destroy(), lingerMs)
      socket.once('close', () => {
        clearTimeout(timer)
      })
    }
  })
}

// What the tracker is measured against, each in a process of its own that ends with SIGTERM:
//   udp-echo BYTES       an empty Node UDP server with a reply of that size
//   http                 node:http with an empty reply
//   fastify              fastify's empty route
//   bittorrent-tracker DIRECTORY   the package of that name, installed there, UDP alone
// It writes the line that startChild waits for to stderr.
import { createSocket } from 'node:dgram'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { fastify } from 'fastify'

const host = '127.0.0.1'
const [kind = '', argument = ''] = process.argv.slice(2)

switch (kind) {
  case 'udp-echo': {
    const reply = Buffer.alloc(Number(argument))
    const socket = createSocket('udp4')
    socket.on('message', (_message, sender) => {
      socket.send(reply, sender.port, sender.address)
    })
    socket.bind(0, host, () => {
      tell(socket.address().port)
    })
    break
  }
  case 'http': {
    const server = createServer((_request, response) => {
      response.end()
    })
    server.listen(0, host, () => {
      tell((server.address() as AddressInfo).port)
    })
    break
  }
  case 'fastify': {
    const app = fastify()
    app.get('/', (_request, reply) => reply.send())
    await app.listen({ port: 0, host })
    tell((app.server.address() as AddressInfo).port)
    break
  }
  case 'bittorrent-tracker': {
    const entry = join(argument, 'node_modules', 'bittorrent-tracker', 'server.js')
    const { default: Server } = (await import(pathToFileURL(entry).href)) as { default: ForeignServerClass }
    const server = new Server({ udp: true, http: false, ws: false, stats: false })
    server.on('error', (error) => {
      process.stderr.write(`${String(error)}\n`)
      process.exit(1)
    })
    server.on('warning', () => undefined)
    // It also binds a socket for IPv6, unasked.
    server.listen(0, { udp: host, udp6: '::1' }, () => {
      tell(server.udp.address().port)
    })
    break
  }
  default:
    process.stderr.write(`There is no reference ${kind}\n`)
    process.exit(2)
}

interface ForeignServer {
  on(event: 'error' | 'warning', listener: (error: unknown) => void): void
  listen(port: number, hosts: { udp: string; udp6: string }, listening: () => void): void
  readonly udp: { address(): AddressInfo }
}

type ForeignServerClass = new (options: Record<'udp' | 'http' | 'ws' | 'stats', boolean>) => ForeignServer

function tell(port: number): void {
  process.stderr.write(`${JSON.stringify({ msg: 'reference is listening', port })}\n`)
}

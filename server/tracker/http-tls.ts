import type { Server, TLSSocket } from 'node:tls'
import { createServer } from 'node:tls'

/** What a TLS listener shows and asks for; PEM. */
export interface TlsMaterial {
  readonly cert: Buffer
  readonly key: Buffer
  /** Who may have issued the certificates of clients. */
  readonly clientCa?: Buffer | undefined
  /** `optional` takes clients without a certificate too, but none with a wrong one. */
  readonly clientCertificates?: 'required' | 'optional' | undefined
}

/**
 * Shakes hands on sockets that are given to it with `emit('connection', socket)`; it does not listen. A new one for new material
 * also means new keys for session tickets: nobody resumes what an old client CA let in.
 *
 * @throws Error when certificate and key cannot be read or do not belong together
 */
export function createTlsHandshaker(
  { cert, key, clientCa, clientCertificates }: TlsMaterial,
  secured: (socket: TLSSocket) => void,
): Server {
  if (clientCertificates !== undefined && clientCa === undefined)
    throw new Error('Cannot ask for client certificates: need the CA that issued them')
  const server = createServer({
    cert,
    key,
    minVersion: 'TLSv1.2',
    ALPNProtocols: ['http/1.1'],
    requestCert: clientCertificates !== undefined,
    rejectUnauthorized: clientCertificates === 'required',
    ...(clientCa && { ca: clientCa }),
  })
  server.on('secureConnection', (socket) => {
    const wrong =
      clientCertificates !== undefined && !socket.authorized && socket.getPeerX509Certificate() !== undefined
    if (wrong) socket.destroy()
    else secured(socket)
  })
  server.on('tlsClientError', (_error, socket) => {
    socket.destroy()
  })
  return server
}

import { X509Certificate } from 'node:crypto'
import { createSecureContext } from 'node:tls'
import { ConfigError } from '../lib/runtime/config.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { ServerConfig } from './config.ts'
import { readTlsMaterial } from './tracker-settings.ts'
import type { TlsMaterial } from './tracker/http-tls.ts'

/** Reads the PEM files of `http.tls`, and sees that they can be used. @throws ConfigError naming the file that cannot */
export async function openCertificates(http: ServerConfig['http']): Promise<TlsMaterial | undefined> {
  const material = await readTlsMaterial(http)
  if (http.tls === undefined || material === undefined) return undefined
  const { cert, key, client_ca } = http.tls
  const use = (what: string, work: () => unknown) => {
    try {
      work()
    } catch (cause) {
      throw new ConfigError([`http.tls: cannot use ${what}: ${(cause as Error).message}`], { cause })
    }
  }
  use(`${cert} and ${key}`, () => createSecureContext({ cert: material.cert, key: material.key }))
  const { clientCa } = material
  if (clientCa) use(client_ca ?? '', () => new X509Certificate(clientCa))
  return material
}

/**
 * Looks at the certificate files every now and then, and has new ones used. Those that cannot be used are logged, and the ones before
 * stay: a renewal replaces certificate and key one after the other.
 */
export function watchCertificates(options: {
  readonly pollMs: number
  /** Those in force, once `openCertificates` has read them again for the configuration in force. */
  readonly look: () => Promise<{ inForce: TlsMaterial | undefined; found: TlsMaterial | undefined }>
  readonly use: (found: TlsMaterial) => Promise<void>
  readonly log: Logger
}): Disposable {
  const { pollMs, look, use, log } = options
  let looking = false
  let fault: string | undefined
  const lookOnce = async () => {
    if (looking) return
    looking = true
    try {
      const { inForce, found } = await look()
      if (found && !(inForce && isSame(inForce, found))) {
        await use(found)
        log.info('certificate changed')
      }
      fault = undefined
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error)
      if (message !== fault)
        log.warn({ err: error }, 'certificate files cannot be used; the last good ones stay')
      fault = message
    } finally {
      looking = false
    }
  }
  const timer = setInterval(() => void lookOnce(), pollMs)
  timer.unref()
  return {
    [Symbol.dispose]: () => {
      clearInterval(timer)
    },
  }
}

function isSame(a: TlsMaterial, b: TlsMaterial): boolean {
  const same = (x: Buffer | undefined, y: Buffer | undefined) => (x && y ? x.equals(y) : x === y)
  return same(a.cert, b.cert) && same(a.key, b.key) && same(a.clientCa, b.clientCa)
}

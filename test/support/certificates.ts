import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export interface Pair {
  readonly cert: Buffer
  readonly key: Buffer
}

/** A certificate authority that openssl made: its certificate, and certificates it signs. */
export interface Authority {
  readonly cert: Buffer
  /** For a server at 127.0.0.1, or a client. */
  issue(commonName: string): Pair
}

export function createAuthority(name: string): Authority {
  const authority = withDirectory((directory) => {
    openssl(directory, `req -x509 ${newKey} -days 2 -subj /CN=${name} -keyout key.pem -out cert.pem`)
    return readPair(directory)
  })
  return {
    cert: authority.cert,
    issue: (commonName) =>
      withDirectory((directory) => {
        writeFileSync(join(directory, 'ca.pem'), authority.cert)
        writeFileSync(join(directory, 'ca-key.pem'), authority.key)
        openssl(
          directory,
          `req -new ${newKey} -subj /CN=${commonName} -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out request.pem`,
        )
        openssl(
          directory,
          'x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -days 2 -copy_extensions copy -out cert.pem',
        )
        return readPair(directory)
      }),
  }
}

const newKey = '-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'

function openssl(cwd: string, line: string): void {
  execFileSync('openssl', line.split(' '), { cwd, stdio: 'pipe' })
}

function readPair(directory: string): Pair {
  return { cert: readFileSync(join(directory, 'cert.pem')), key: readFileSync(join(directory, 'key.pem')) }
}

function withDirectory<Result>(work: (directory: string) => Result): Result {
  const directory = mkdtempSync(join(tmpdir(), 'rackswarm-certificates-'))
  try {
    return work(directory)
  } finally {
    rmSync(directory, { recursive: true })
  }
}

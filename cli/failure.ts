import { RequestError, UnreachableError } from '../lib/client/http.ts'
import { ClientError } from '../lib/protocol/errors.ts'
import { errorCode } from '../lib/runtime/files.ts'

/** Documented and stable. */
export const exitCodes = {
  failure: 1,
  usage: 2,
  degraded: 3,
  auth: 4,
  notFound: 5,
  conflict: 6,
  verification: 7,
  timeout: 8,
  interrupted: 130,
} as const

/** A command's own failure: what could not be done, the exit code, and what to do next. */
export class Failure extends Error {
  override readonly name = 'Failure'
  readonly exitCode: number
  readonly hint: string | undefined

  constructor(exitCode: number, message: string, options: ErrorOptions & { hint?: string | undefined } = {}) {
    super(message, options)
    this.exitCode = exitCode
    this.hint = options.hint
  }
}

/** Any error as a failure. */
export function failureOf(error: unknown): Failure {
  if (error instanceof Failure) return error
  if (error instanceof RequestError)
    return new Failure(codeOfStatus(error.status), error.message, {
      cause: error,
      hint: error.hint ?? hintOfStatus(error.status),
    })
  if (error instanceof UnreachableError) {
    return new Failure(exitCodes.failure, error.message, {
      cause: error,
      hint: '`deployctl doctor` looks at what is between here and there.',
    })
  }
  if (error instanceof ClientError) return new Failure(exitCodes.usage, error.message, { cause: error })
  if (errorCode(error) === 'ENOENT')
    return new Failure(
      exitCodes.notFound,
      `There is no file ${(error as NodeJS.ErrnoException).path ?? ''}`,
      {
        cause: error,
      },
    )
  return new Failure(exitCodes.failure, error instanceof Error ? error.message : String(error), {
    cause: error,
  })
}

function codeOfStatus(status: number): number {
  if (status === 400 || status === 422) return exitCodes.usage
  if (status === 401 || status === 403) return exitCodes.auth
  if (status === 404) return exitCodes.notFound
  if (status === 409) return exitCodes.conflict
  return exitCodes.failure
}

function hintOfStatus(status: number): string | undefined {
  if (status === 401) return '`deployctl login URL` stores a credential.'
  if (status === 403) return 'The token does not allow it: `deployctl token inspect` shows its scopes.'
  if (status === 404) return '`deployctl list` shows what there is.'
  return undefined
}

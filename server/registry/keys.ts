import type { FastifyInstance } from 'fastify'
import type { KeyInfo, KeyList } from '../../lib/client/api.ts'
import { ImportKeyRequest, RotateKeyRequest } from '../../lib/client/api.ts'
import { ClientError } from '../../lib/protocol/errors.ts'
import type { KeyRing } from '../../lib/token/key-ring.ts'
import { readForeignKey } from '../../lib/token/key-ring.ts'
import { readCompact } from '../../lib/token/compact.ts'
import type { SigningKey } from '../../lib/token/signing-keys.ts'
import { readCredential, requireAdmin } from './access-control.ts'
import type { AccessControl } from './access.ts'
import { ApiError } from './api-error.ts'
import type { Audit } from './audit.ts'
import { validate } from './validate.ts'

export interface KeyDeps {
  readonly keys: KeyRing
  readonly access: AccessControl
  readonly audit: Audit
}

/** The signing keys, for administrators: never their private parts. */
export function registerKeyRoutes(app: FastifyInstance, { keys, access, audit }: KeyDeps): void {
  app.get('/api/v1/keys', async (request): Promise<KeyList> => {
    await requireAdmin(access, request)
    return { keys: keys.list().map((key) => infoOf(key, keys)) }
  })

  app.post('/api/v1/keys/rotate', async (request): Promise<KeyInfo> => {
    const caller = await requireAdmin(access, request)
    const { algorithm, now = false } = validate(RotateKeyRequest, request.body)
    const act = { action: 'key.rotate', target: keys.signer.key.kid, details: { now } } as const
    return audit(request, caller, act, async () =>
      infoOf(await keys.rotate({ algorithm, atOnce: now }).catch(asConflict), keys),
    )
  })

  app.post('/api/v1/keys', async (request, reply): Promise<KeyInfo> => {
    const caller = await requireAdmin(access, request)
    const { key: text, kid, verifyOnly = false } = validate(ImportKeyRequest, request.body)
    const key = await readForeignKey(text, kid)
    const act = { action: 'key.import', target: key.kid, details: { verifyOnly } } as const
    void reply.code(201)
    return audit(request, caller, act, async () =>
      infoOf(await keys.add(key, { verifyOnly }).catch(asConflict), keys),
    )
  })

  app.delete<{ Params: { kid: string } }>('/api/v1/keys/:kid', async (request, reply) => {
    const caller = await requireAdmin(access, request)
    const { kid } = request.params
    if (!keys.keys.has(kid))
      throw new ApiError(404, 'NOT_FOUND', `There is no key ${kid}`, {
        hint: '`deployctl keys list` shows them.',
      })
    // Who locks himself out could not even see whether it was done.
    if (kidOf(request.headers.authorization) === kid)
      throw new ApiError(409, 'OWN_KEY', `Cannot revoke ${kid}: it signed the token that you use`, {
        hint: 'First `deployctl keys rotate --now`, and make a new token: deployctl token create --name NAME --scope admin.',
      })
    await audit(request, caller, { action: 'key.revoke', target: kid }, () => keys.revoke(kid))
    return reply.code(204).send()
  })
}

/** What is right in itself, but not as things are. */
function asConflict(error: unknown): never {
  if (error instanceof ClientError && error.code in hints)
    throw new ApiError(409, error.code, error.message, { hint: hints[error.code] ?? '', cause: error })
  throw error
}

const hints: Readonly<Record<string, string>> = {
  ROTATION_UNDER_WAY: 'Wait, or have it sign at once: deployctl keys rotate --now.',
  KEY_EXISTS: '`deployctl keys list` shows them.',
  TOO_MANY_KEYS: '`deployctl keys list` shows them.',
}

function infoOf(key: SigningKey, keys: KeyRing): KeyInfo {
  const { kid, algorithm, state, createdAt, since } = key
  const dueAt = keys.dueAt(key)
  return {
    kid,
    algorithm,
    state,
    createdAt: createdAt.toISOString(),
    since: since.toISOString(),
    ...(dueAt === undefined ? {} : { dueAt: dueAt.toISOString() }),
  }
}

/** Of the token of a request, which was verified. */
function kidOf(authorization = ''): unknown {
  return readCompact(readCredential(authorization) ?? '').header['kid']
}

import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { parseContentDigest } from '../../lib/protocol/digest.ts'
import { ApiError } from './api-error.ts'
import { require, withScope } from './oci/authorize.ts'
import { deleteBlob, getBlob } from './oci/blobs.ts'
import type { Context, OciDeps } from './oci/context.ts'
import { unsupported } from './oci/context.ts'
import { listCatalog, listReferrers, listTags } from './oci/listings.ts'
import { deleteManifest, getManifest, putManifest } from './oci/manifests.ts'
import { sendError } from './oci/send-error.ts'
import { continueUpload, startUpload } from './oci/uploads.ts'
import type { OciTarget } from './oci-path.ts'
import { parseOciPath } from './oci-path.ts'

/** The OCI distribution API (distribution-spec 1.1) below /v2/. Errors have the spec's body. */
export function registerOciRoutes(app: FastifyInstance, deps: OciDeps): void {
  void app.register((scope, _options, done) => {
    // Bodies are streams of any type and size; each handler reads, and bounds, its own.
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', (_request, _payload, parsed) => {
      parsed(null)
    })
    scope.setErrorHandler((error, _request, reply) => sendError(error, reply, deps.log))
    const handler = async (request: FastifyRequest, reply: FastifyReply) => {
      reply.header('docker-distribution-api-version', 'registry/2.0')
      const target = parseOciPath((request.raw.url ?? '').split('?')[0]?.replace(/^\/v2\/?/, '') ?? '')
      const caller = await deps.access.callerOf(request.headers).catch((error: unknown) => {
        throw withScope(error, target, request)
      })
      return dispatch(target, { request, reply, caller, ...deps })
    }
    for (const url of ['/v2', '/v2/', '/v2/*']) {
      scope.route({ method: ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE'], url, handler })
    }
    done()
  })
}

async function dispatch(target: OciTarget, context: Context): Promise<FastifyReply> {
  const { request, reply } = context
  const method = request.method
  const reads = method === 'GET' || method === 'HEAD'
  switch (target.kind) {
    case 'base':
      if (!reads) throw unsupported(method)
      if (context.caller.kind === 'anonymous')
        throw new ApiError(401, 'UNAUTHORIZED', 'Cannot tell who asks: the token flow says how', {
          headers: { 'www-authenticate': context.access.challenge },
        })
      return reply.send({})
    case 'catalog':
      if (!reads) throw unsupported(method)
      return listCatalog(context)
    case 'tags':
      if (!reads) throw unsupported(method)
      require(context, 'pull', target.repository)
      return listTags(target.repository, context)
    case 'referrers':
      if (!reads) throw unsupported(method)
      require(context, 'pull', target.repository)
      return listReferrers(target.repository, parseContentDigest(target.digest), context)
    case 'blob':
      if (method === 'DELETE') {
        require(context, 'delete', target.repository)
        return deleteBlob(target.repository, parseContentDigest(target.digest), context)
      }
      if (!reads) throw unsupported(method)
      require(context, 'pull', target.repository)
      return getBlob(target.repository, parseContentDigest(target.digest), context)
    case 'manifest':
      require(context, reads ? 'pull' : method === 'DELETE' ? 'delete' : 'publish', target.repository)
      if (reads) return getManifest(target, context)
      if (method === 'PUT') return putManifest(target, context)
      if (method === 'DELETE') return deleteManifest(target, context)
      throw unsupported(method)
    case 'uploads':
      if (method !== 'POST') throw unsupported(method)
      require(context, 'publish', target.repository)
      return startUpload(target.repository, context)
    case 'upload':
      require(context, 'publish', target.repository)
      return continueUpload(target, context)
  }
}

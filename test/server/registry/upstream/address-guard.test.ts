import assert from 'node:assert/strict'
import { once } from 'node:events'
import type { RequestListener } from 'node:http'
import { createServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { parseIp } from '../../../../lib/protocol/address.ts'
import { createAddressGuard, reachOf } from '../../../../server/registry/upstream/address-guard.ts'
import { createUpstreamHttp } from '../../../../server/registry/upstream/upstream-http.ts'
import { createAuthority } from '../../../support/certificates.ts'
import { startHttp } from '../../../support/registry-front.ts'

test('reachOf() knows this machine and its link in every way of writing them', () => {
  const reach = (text: string) => {
    const ip = parseIp(text)
    return ip && reachOf(ip)
  }
  for (const own of ['127.0.0.1', '127.9.9.9', '0.0.0.0', '0.1.2.3', '::1', '::', '::ffff:127.0.0.1'])
    assert.equal(reach(own), 'loopback', own)
  for (const link of ['169.254.169.254', '169.254.0.1', 'fe80::1', 'febf::1', '::ffff:169.254.169.254'])
    assert.equal(reach(link), 'link-local', link)
  for (const other of ['10.0.0.1', '192.0.2.2', '169.253.0.1', 'fd00::1', 'fec0::1', '2001:db8::1'])
    assert.equal(reach(other), 'elsewhere', other)
})

test('an upstream leads to https or its own scheme, and to this machine only if it is there itself', () => {
  const allows = (upstream: string, to: string) => {
    try {
      createAddressGuard(new URL(upstream)).check(new URL(to))
      return true
    } catch {
      return false
    }
  }
  assert.ok(allows('https://registry.example', 'https://storage.example/x'))
  assert.ok(!allows('https://registry.example', 'http://storage.example/x'))
  assert.ok(allows('http://registry.example', 'https://storage.example/x'))
  assert.ok(!allows('https://registry.example', 'file:///etc/passwd'))
  for (const to of ['127.0.0.1', '[::1]', '[::ffff:127.0.0.1]', '0.0.0.0', '2130706433', '0x7f.1', '127.1'])
    assert.ok(!allows('https://registry.example', `https://${to}/x`), to)
  assert.ok(!allows('https://registry.example', 'https://169.254.169.254/latest/meta-data'))
  assert.ok(allows('http://127.0.0.1:5000', 'http://127.0.0.1:9000/x'))
  assert.ok(!allows('http://127.0.0.1:5000', 'http://169.254.169.254/latest/meta-data'))
})

test('a redirect to this machine is not followed, by its address or by a name for it', async (t) => {
  const { url, host, requests } = await victim(t)
  await using http = createUpstreamHttp(new URL('http://registry.example'), undefined)
  const get = (to: string) =>
    http.send({ method: 'GET', url: new URL(to), signal: AbortSignal.timeout(10_000) })
  await assert.rejects(get(url), /leads to 127\.0\.0\.1/)
  await assert.rejects(get(url.replace('127.0.0.1', 'localhost')), /leads to localhost/)
  assert.equal(requests.length, 0)

  // One that is there itself may send us elsewhere on this machine, but not to its link.
  const { url: upstream } = await startHttp(t, (request, response) => {
    const to = request.url === '/near' ? `http://${host}/data` : 'http://169.254.169.254/latest'
    response.writeHead(307, { location: to }).end()
  })
  await using own = createUpstreamHttp(new URL(upstream), undefined)
  const call = { method: 'GET', authorization: 'Bearer secret', signal: AbortSignal.timeout(10_000) } as const
  const answer = await own.send({ ...call, url: new URL('/near', upstream) })
  assert.equal((await answer.text(100)).toString(), 'here')
  assert.deepEqual(
    requests,
    [{ url: '/data', authorization: undefined }],
    'the credential stays with its host',
  )
  await assert.rejects(own.send({ ...call, url: new URL('/far', upstream) }), /leads to 169\.254\.169\.254/)
})

test('an upstream with a certificate of its own authority is reached with that, and leads to https alone', async (t) => {
  const authority = createAuthority('corporate')
  const { url: plain, requests } = await victim(t)
  const answer: RequestListener = (request, response) => {
    if (request.url === '/down') response.writeHead(307, { location: plain }).end()
    else response.end('secured')
  }
  const listen = async () => {
    const server = createServer({ ...authority.issue('registry') }, answer).listen(0, '127.0.0.1')
    await once(server, 'listening')
    t.after(() => {
      server.closeAllConnections()
      server.close()
    })
    return `https://127.0.0.1:${(server.address() as AddressInfo).port}`
  }
  const url = await listen()
  const storage = await listen()
  const signal = AbortSignal.timeout(10_000)
  await using http = createUpstreamHttp(new URL(url), authority.cert.toString())
  for (const at of [url, storage])
    assert.equal(
      (await (await http.send({ method: 'GET', url: new URL(at), signal })).text(100)).toString(),
      'secured',
    )
  await assert.rejects(http.send({ method: 'GET', url: new URL('/down', url), signal }), /leads to http: at/)
  assert.equal(requests.length, 0)
  await using stranger = createUpstreamHttp(new URL(url), undefined)
  await assert.rejects(stranger.send({ method: 'GET', url: new URL(url), signal }), { fault: 'down' })
})

test('redirects without an end, and bodies without a bound, are given up', async (t) => {
  const { url } = await startHttp(t, (request, response) => {
    if (request.url === '/loop') response.writeHead(302, { location: '/loop' }).end()
    else response.end(Buffer.alloc(100_000))
  })
  await using http = createUpstreamHttp(new URL(url), undefined)
  const signal = AbortSignal.timeout(10_000)
  await assert.rejects(http.send({ method: 'GET', url: new URL('/loop', url), signal }), /more than 5 times/)
  const answer = await http.send({ method: 'GET', url: new URL('/large', url), signal })
  await assert.rejects(answer.text(1000), /more than 1000 bytes/)
})

async function victim(t: TestContext) {
  const requests: { url: string | undefined; authorization: string | undefined }[] = []
  const server = await startHttp(t, (request, response) => {
    requests.push({ url: request.url, authorization: request.headers.authorization })
    response.end('here')
  })
  return { ...server, requests }
}

import assert from 'node:assert/strict'
import { generateKeyPairSync } from 'node:crypto'
import { chmod, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'
import { test } from 'node:test'
import { readOrMakeSecret } from '../../../lib/runtime/secret-file.ts'
import { createTickets } from '../../../lib/token/ticket.ts'
import { importVerificationKey } from '../../../lib/token/verification-key.ts'

const secret = 'a secret of thirty-two characters'

/** As a server opens them. */
const ticketsOf = async (file: string) => createTickets(await readOrMakeSecret(file))

test('a ticket is for one token, one key and one secret', () => {
  const [key, otherKey] = [makeKey('main'), makeKey('main')]
  const tickets = createTickets(secret)
  const ticket = tickets.issue('a.b.c', key)
  assert.match(ticket, /^[\w-]{22}$/)
  assert.equal(tickets.check('a.b.c', key, ticket), ticket)
  assert.equal(createTickets(` ${secret}\n`).check('a.b.c', key, ticket), ticket, 'a sibling takes it')
  assert.equal(tickets.check('a.b.d', key, ticket), undefined)
  assert.equal(tickets.check('a.b.c', otherKey, ticket), undefined, 'a new key by an old name')
  assert.equal(createTickets(`${secret}!`).check('a.b.c', key, ticket), undefined)
  for (const wrong of [
    '',
    'x'.repeat(22),
    ticket.slice(1),
    `${ticket}A`,
    `${ticket.slice(0, -1)}é`,
    '日'.repeat(22),
  ])
    assert.equal(tickets.check('a.b.c', key, wrong), undefined, wrong)
})

test('the secret is made once, readable by its owner alone, and outlives a restart', async (t) => {
  const file = join(await makeDirectory(t), 'new', 'ticket-secret')
  const key = makeKey('main')
  const ticket = (await ticketsOf(file)).issue('a.b.c', key)
  assert.equal((await stat(file)).mode & 0o777, 0o600)
  assert.ok((await readFile(file, 'utf8')).trim().length >= 43)
  assert.equal((await ticketsOf(file)).check('a.b.c', key, ticket), ticket)
  assert.equal(createTickets(await readFile(file, 'utf8')).check('a.b.c', key, ticket), ticket)
})

test('a secret that others can read, or that is too short, is refused', async (t) => {
  const file = join(await makeDirectory(t), 'ticket-secret')
  await ticketsOf(file)
  await chmod(file, 0o640)
  await assert.rejects(ticketsOf(file), /ticket-secret: others can read it/)
  await chmod(file, 0o600)
  await writeFile(file, 'short\n')
  await assert.rejects(ticketsOf(file), /it has 5 characters, need 32/)
  assert.throws(() => createTickets('x'.repeat(31)), /need 32/)
})

function makeKey(kid: string) {
  const { publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  return importVerificationKey({ ...publicKey.export({ format: 'jwk' }), kid })
}

async function makeDirectory(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'rackswarm-ticket-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return directory
}

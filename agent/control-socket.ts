import { chmod, chown, lstat, mkdir, readFile, unlink } from 'node:fs/promises'
import { connect } from 'node:net'
import { dirname } from 'node:path'
import { errorCode, ignoreMissing } from '../lib/runtime/files.ts'

/**
 * Clears the way for a listening unix socket: makes its directory (0750) and removes a socket file that nobody answers on.
 *
 * @throws Error when another agent answers there, or the path is something else
 */
export async function prepareSocketPath(path: string, group: string): Promise<void> {
  const made = await mkdir(dirname(path), { recursive: true, mode: 0o750 })
  const gid = await groupId(group)
  if (made !== undefined && gid !== undefined) await chown(dirname(path), -1, gid).catch(ignoreForbidden)
  const stats = await lstat(path).catch(ignoreMissing)
  if (!stats) return
  if (!stats.isSocket()) throw new Error(`Cannot listen on ${path}: it is there and is no socket`)
  if (await answers(path)) throw new Error(`Cannot listen on ${path}: another agent answers on it`)
  await unlink(path).catch(ignoreMissing)
}

/** 0660, for the group where there is such a group. */
export async function protectSocket(path: string, group: string): Promise<void> {
  const gid = await groupId(group)
  if (gid !== undefined) await chown(path, -1, gid).catch(ignoreForbidden)
  await chmod(path, 0o660)
}

async function groupId(name: string): Promise<number | undefined> {
  const text = await readFile('/etc/group', 'utf8').catch(() => '')
  const line = text.split('\n').find((candidate) => candidate.startsWith(`${name}:`))
  const gid = Number(line?.split(':')[2])
  return line !== undefined && Number.isInteger(gid) ? gid : undefined
}

async function answers(path: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const socket = connect(path)
    socket.setTimeout(2000, () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', (error) => {
      if (['ECONNREFUSED', 'ENOENT'].includes(errorCode(error) ?? '')) resolve(false)
      else reject(new Error(`Cannot listen on ${path}: ${error.message}`, { cause: error }))
    })
  })
}

/** A user who is not in the group, or not root: the socket is then for this user alone. */
function ignoreForbidden(error: unknown): void {
  if (!['EPERM', 'EACCES'].includes(errorCode(error) ?? '')) throw error
}

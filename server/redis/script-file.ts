import { readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { RedisScript } from './connection.ts'
import { redisScript } from './connection.ts'

/**
 * Reads a script in Lua that lies beside its caller: `readScript(new URL('./scripts/put.lua', import.meta.url))`, written just so, since
 * what is shipped has those files elsewhere (packaging/bundle.ts). It begins with the text of `common`, which several share.
 */
export function readScript(url: URL, common?: RedisScript): RedisScript {
  const file = fileURLToPath(url)
  const text = readFileSync(file, 'utf8')
  return redisScript(basename(file, '.lua'), common ? `${common.text}\n${text}` : text)
}

// A post-hook: writes a line of JSON for each download that has been completed.
import { open } from 'node:fs/promises'
import { formatEndpoint, infoHashToHex } from 'rackswarm'

/**
 * Options: `file`, which is appended to; a relative path begins at the working directory.
 *
 * @type {import('rackswarm').CreatePostHook}
 */
export default async function createCompletionsLog({ file }, { now }) {
  if (typeof file !== 'string') throw new Error('file: need the path of the file to write to')
  const handle = await open(file, 'a')
  return {
    name: 'completions-log',
    // One record at a time: the tracker waits for the promise before it tells of the next one.
    async announced({ announce, endpoint, counts }) {
      if (announce.event !== 'completed') return
      const line = {
        at: new Date(now()).toISOString(),
        infoHash: infoHashToHex(announce.infoHash),
        peer: formatEndpoint(endpoint),
        seeders: counts.complete,
        leechers: counts.incomplete,
      }
      await handle.write(`${JSON.stringify(line)}\n`)
    },
    [Symbol.asyncDispose]: () => handle.close(),
  }
}

// What documents tell people to run, as it stands there.
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'

/** The block of code that comes next after a text of a document in docs/. @throws Error where there is none */
export async function blockAfter(document: string, text: string): Promise<string> {
  const content = await readFile(join(import.meta.dirname, '..', '..', 'docs', document), 'utf8')
  const from = content.indexOf(text)
  const [, block] = /^```\w*\n([^]*?)^```$/m.exec(from < 0 ? '' : content.slice(from)) ?? []
  if (block === undefined) throw new Error(`docs/${document} has no block after ${JSON.stringify(text)}`)
  return block
}

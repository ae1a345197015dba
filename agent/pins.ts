import { readFile } from 'node:fs/promises'
import { z } from 'zod'
import { isMissing, writeFileAtomic } from '../lib/runtime/files.ts'

/** References that a person wants kept whatever the quota says. */
export interface Pins {
  has(reference: string): boolean
  list(): string[]
  add(reference: string): Promise<void>
  remove(reference: string): Promise<void>
}

/** Pins at most. */
export const pinsMax = 1000

export async function openPins(file: string): Promise<Pins> {
  const pins = new Set(await read(file))
  // One after the other, so that the last change is what the file says.
  let turn: Promise<unknown> = Promise.resolve()
  const write = async () => {
    const mine = turn
      .catch(() => undefined)
      .then(() => writeFileAtomic(file, `${JSON.stringify([...pins])}\n`))
    turn = mine
    await mine
  }
  return {
    has: (reference) => pins.has(reference),
    list: () => [...pins],
    add: async (reference) => {
      if (pins.has(reference)) return
      if (pins.size >= pinsMax)
        throw new RangeError(`Cannot pin ${reference}: there are ${pinsMax} pins already`)
      pins.add(reference)
      await write()
    },
    remove: async (reference) => {
      if (pins.delete(reference)) await write()
    },
  }
}

async function read(file: string): Promise<string[]> {
  try {
    return z
      .array(z.string())
      .max(pinsMax)
      .parse(JSON.parse(await readFile(file, 'utf8')))
  } catch (error) {
    if (isMissing(error)) return []
    throw new Error(`Cannot read pins from ${file}: ${(error as Error).message}`, { cause: error })
  }
}

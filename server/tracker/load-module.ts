import { isAbsolute, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

/** `./hook.js`, `../hooks/ours.js`, `/etc/rackswarm/hook.js`: what is not one is the name of a part that ships with the tracker. */
export function isModulePath(name: string): boolean {
  return isAbsolute(name) || name.startsWith('./') || name.startsWith('../')
}

/**
 * Imports what a module exports by default, which must be a function. Relative paths begin at `directory`: where the
 * configuration lies.
 *
 * @throws Error naming the module and what is wrong with it
 */
export async function loadModule(path: string, directory: string): Promise<(...args: unknown[]) => unknown> {
  const file = resolve(directory, path)
  let exported: unknown
  try {
    ;({ default: exported } = (await import(pathToFileURL(file).href)) as { default?: unknown })
  } catch (cause) {
    throw new Error(`Cannot load module ${file}: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    })
  }
  if (typeof exported !== 'function')
    throw new Error(`Cannot use module ${file}: its default export must be a function that makes the part`)
  return exported as (...args: unknown[]) => unknown
}

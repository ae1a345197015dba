import { isAbsolute, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

/** `./hook.js`, `../hooks/ours.js`, `/etc/rackswarm/hook.js`: what is not one is the name of a part that ships with the tracker. */
export function isModulePath(name: string): boolean {
  return isAbsolute(name) || name.startsWith('./') || name.startsWith('../')
}

/**
 * Has a module of somebody else's make its part: calls what it exports by default, which must be a function. Relative paths begin at
 * `directory`: where the configuration lies.
 *
 * @throws Error naming the module and what is wrong with it, or why it cannot make the part
 */
export async function makeOfModule(
  path: string,
  directory: string,
  options: Readonly<Record<string, unknown>>,
  deps: object,
): Promise<object> {
  const create = await loadModule(path, directory)
  let made: unknown
  try {
    made = await create(options, deps)
  } catch (cause) {
    throw new Error(`Cannot use module ${path}: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    })
  }
  if (typeof made !== 'object' || made === null)
    throw new Error(`Cannot use module ${path}: its default export must return the part that it makes`)
  return made
}

async function loadModule(
  path: string,
  directory: string,
): Promise<(options: unknown, deps: unknown) => unknown> {
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
  return exported as (options: unknown, deps: unknown) => unknown
}

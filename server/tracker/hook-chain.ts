import type { z } from 'zod'
import type { HookDeps, PostHook, PreHook, PreHookDefinition } from './hooks.ts'
import { builtInPreHooks } from './hooks/built-in.ts'
import { isModulePath, makeOfModule } from './load-module.ts'

/** A hook as the configuration has it. */
export interface HookEntry {
  readonly name: string
  readonly options: Readonly<Record<string, unknown>>
}

/** What a module of somebody else's exports by default. */
export type CreatePreHook = (
  options: Readonly<Record<string, unknown>>,
  deps: HookDeps,
) => PreHook | Promise<PreHook>
export type CreatePostHook = (
  options: Readonly<Record<string, unknown>>,
  deps: HookDeps,
) => PostHook | Promise<PostHook>

export interface HookChain extends AsyncDisposable {
  readonly hooks: readonly PreHook[]
}

/**
 * Makes the pre-hooks of a configuration, in its order. Modules are looked for from `directory` on.
 *
 * @throws Error naming the hook that cannot be made, and why; those made before it are disposed
 */
export async function createHookChain(
  entries: readonly HookEntry[],
  directory: string,
  deps: HookDeps,
): Promise<HookChain> {
  await using made = new AsyncDisposableStack()
  const hooks: PreHook[] = []
  for (const entry of entries) {
    const hook = await createPreHook(entry, directory, deps)
    made.defer(async () => hook[Symbol.asyncDispose]?.())
    hooks.push(hook)
  }
  const owned = made.move()
  return { hooks, [Symbol.asyncDispose]: () => owned.disposeAsync() }
}

/** @throws Error naming the hook that cannot be made, and why; those made before it are disposed */
export async function createPostHooks(
  entries: readonly HookEntry[],
  directory: string,
  deps: HookDeps,
): Promise<PostHook[]> {
  await using made = new AsyncDisposableStack()
  const hooks: PostHook[] = []
  for (const { name, options } of entries) {
    const hook = (await makeOfModule(name, directory, options, deps)) as PostHook
    made.defer(async () => hook[Symbol.asyncDispose]?.())
    hooks.push(hook)
  }
  made.move()
  return hooks
}

async function createPreHook(
  { name, options }: HookEntry,
  directory: string,
  deps: HookDeps,
): Promise<PreHook> {
  if (isModulePath(name)) return (await makeOfModule(name, directory, options, deps)) as PreHook
  const definition: PreHookDefinition<z.ZodType> | undefined = builtInPreHooks.find(
    (known) => known.name === name,
  )
  if (!definition) throw new Error(`Cannot make hook ${name}: there is none of that name`)
  try {
    return await definition.create(definition.options.parse(options), deps)
  } catch (cause) {
    throw new Error(`Cannot make hook ${name}: ${cause instanceof Error ? cause.message : String(cause)}`, {
      cause,
    })
  }
}

import type { KeySet, KeySetDeps } from './current-keys.ts'
import type { KeySetFile } from './key-set-file.ts'
import { openKeySetFile } from './key-set-file.ts'
import type { KeySetUrl } from './key-set-url.ts'
import { openKeySetUrl } from './key-set-url.ts'

export type KeySetSource = KeySetFile | KeySetUrl

/**
 * Opens a key set. A URL that is down does not keep it from opening: it has no keys until the first good fetch, or those
 * of the cache file.
 *
 * @throws Error naming the file that holds no key set, or saying that the URL is none
 */
export async function openKeySet(source: KeySetSource, deps: KeySetDeps): Promise<KeySet> {
  return 'file' in source ? openKeySetFile(source, deps) : openKeySetUrl(source, deps)
}

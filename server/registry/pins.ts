import type { Pin } from '../../lib/client/api.ts'
import type { Digest } from '../../lib/protocol/digest.ts'
import type { Reference } from '../../lib/protocol/reference.ts'
import { formatReference } from '../../lib/protocol/reference.ts'
import type { InTurn } from '../../lib/runtime/turn.ts'
import type { StateStore } from '../state/state-store.ts'
import { ApiError } from './api-error.ts'
import type { BlobStore } from './blob-store.ts'

/** References that no retention rule and no collection removes: a tag stays, and so does what it named when it was pinned. */
export interface Pins {
  list(): Promise<Pin[]>
  /** @throws ApiError 404 if there is no such manifest, 507 if there are too many */
  pin(reference: Reference, by: string): Promise<Pin>
  /** @returns whether it was pinned */
  unpin(reference: Reference): Promise<boolean>
}

const pinsMax = 10_000
const prefix = 'pins/'

export function createPins({
  state,
  store,
  inTurn,
  now,
}: {
  state: StateStore
  store: BlobStore
  inTurn: InTurn
  now: () => number
}): Pins {
  const keyOf = ({ repository, tag, digest }: Reference) => {
    if (tag !== undefined && digest !== undefined)
      throw new ApiError(400, 'BAD_REQUEST', 'Cannot use a reference with both: need NAME:TAG or NAME@DIGEST')
    return `${prefix}${formatReference({ repository, tag, digest })}`
  }
  const list = async () =>
    (await state.list(prefix, { limit: pinsMax })).map(({ key, value }) => ({
      reference: key.slice(prefix.length),
      ...(value as Omit<Pin, 'reference'>),
    }))
  return {
    list,
    pin: (reference, by) => {
      const key = keyOf(reference)
      const { repository, tag } = reference
      return inTurn(repository, async () => {
        const digest =
          reference.digest ?? (tag === undefined ? undefined : (await store.getTag(repository, tag))?.digest)
        // Claimed first: a collection that has read the pins already leaves it alone.
        if (digest === undefined || !(await store.claimManifest(repository, digest)))
          throw new ApiError(404, 'NOT_FOUND', `There is no manifest ${formatReference(reference)}`, {
            hint: '`deployctl list` shows what there is.',
          })
        if ((await state.get(key)) === undefined && (await list()).length >= pinsMax)
          throw new ApiError(507, 'TOO_MANY_PINS', `Cannot pin: there are ${pinsMax} pins`, {
            hint: '`deployctl registry pins` shows them, `deployctl registry unpin` removes one.',
          })
        const value = { digest, pinnedAt: new Date(now()).toISOString(), by }
        await state.put(key, value)
        return { reference: key.slice(prefix.length), ...value }
      })
    },
    unpin: (reference) => {
      const key = keyOf(reference)
      return inTurn(reference.repository, async () => {
        const entry = await state.get(key)
        if (!entry) return false
        const { digest } = entry.value as Pick<Pin, 'digest'>
        await store.claimManifest(reference.repository, digest as Digest)
        return state.delete(key)
      })
    },
  }
}

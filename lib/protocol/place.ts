import { ClientError } from './errors.ts'

declare const brand: unique symbol

/** The name of a leaf of the topology: a rack. */
export type Place = string & { readonly [brand]: 'Place' }

/** @throws ClientError `bad_place` unless the name has 1 to 64 of A-Z a-z 0-9 . _ : / - */
export function parsePlace(text: string): Place {
  if (!isPlace(text)) {
    throw new ClientError(
      'bad_place',
      `Cannot read place ${JSON.stringify(text.slice(0, 80))}: need up to 64 of A-Z a-z 0-9 . _ : / -`,
    )
  }
  return text
}

export function isPlace(text: string): text is Place {
  return /^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$/.test(text)
}

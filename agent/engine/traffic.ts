import type { PeerTraffic } from './engine.ts'

/** Sources told apart per torrent; the rest is summed under `other`. */
const sourcesMax = 200

interface Sum {
  readonly kind: 'peer' | 'webseed'
  place: string | undefined
  downloaded: number
  uploaded: number
}

/** Bytes by source, summed over connections that came and went. */
export class TrafficSums {
  readonly #sums = new Map<string, Sum>()

  add(
    source: string,
    kind: 'peer' | 'webseed',
    place: string | undefined,
    downloaded: number,
    uploaded: number,
  ): void {
    if (downloaded === 0 && uploaded === 0) return
    const key = this.#sums.has(source) || this.#sums.size < sourcesMax ? source : 'other'
    const sum = this.#sums.get(key)
    if (sum === undefined) {
      this.#sums.set(key, { kind, place: key === 'other' ? undefined : place, downloaded, uploaded })
      return
    }
    sum.downloaded += downloaded
    sum.uploaded += uploaded
    if (key !== 'other') sum.place ??= place
  }

  copy(): TrafficSums {
    const copy = new TrafficSums()
    for (const [source, sum] of this.#sums) copy.#sums.set(source, { ...sum })
    return copy
  }

  list(): PeerTraffic[] {
    return [...this.#sums].map(([source, { kind, place, downloaded, uploaded }]) => ({
      source,
      place,
      kind,
      downloadedBytes: downloaded,
      uploadedBytes: uploaded,
    }))
  }
}

/**
 * A bounded queue with a lane for each source, served one item a lane in turn. A lane may hold as much as is still
 * free, so a flood from one source takes at most half, one from n sources leaves 1/(n + 1), and whoever comes next
 * finds room and waits one round at most.
 */
export interface FairQueue<Item extends object> {
  readonly size: number
  /** False when the lane is full. */
  push(item: Item, lane: number): boolean
  /** The next `count` items, or all there are. */
  take(count: number): Item[]
}

interface Lane<Item> {
  items: Item[]
  /** Where the first waiting item is; moving the others up for each one taken would cost too much. */
  head: number
}

export function createFairQueue<Item extends object>(max: number): FairQueue<Item> {
  /** In the order in which they are served. An empty lane is not kept. */
  const lanes = new Map<number, Lane<Item>>()
  let size = 0
  return {
    get size() {
      return size
    },
    push: (item, name) => {
      const lane = lanes.get(name)
      if ((lane ? lane.items.length - lane.head : 0) >= max - size) return false
      if (lane) lane.items.push(item)
      else lanes.set(name, { items: [item], head: 0 })
      size++
      return true
    },
    take: (count) => {
      const taken: Item[] = []
      while (taken.length < count) {
        const next = lanes.entries().next()
        if (next.done) break
        const [name, lane] = next.value
        const item = lane.items[lane.head]
        if (item === undefined) break
        taken.push(item)
        lanes.delete(name)
        lane.head++
        if (lane.head * 2 >= lane.items.length) {
          lane.items = lane.items.slice(lane.head)
          lane.head = 0
        }
        if (lane.items.length > 0) lanes.set(name, lane)
      }
      size -= taken.length
      return taken
    },
  }
}

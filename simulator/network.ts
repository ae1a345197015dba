/** A link carries what passes it in one direction. */
export type LinkId = number
/** Bytes on their way from one host to another, over links that it shares with other flows. */
export type FlowId = number

/** Links on the way of a flow at most: host, rack and row on either side. */
const linksMax = 6
/** Passes of sharing in each step. */
const passes = 4
/** A link with less left than this share of its step is full. */
const fullShare = 0.002
/** Fewer than this many bytes are none. */
const minBytes = 1e-6

/**
 * A fluid network: in each step of time what passes a link is shared evenly among the flows over it, and what a flow cannot use, because another
 * link of its way is full, among the others (progressive filling, a few passes of it). No packets, no losses, no queues, no
 * slow start: a flow has its share from one step to the next.
 */
export class Network {
  readonly #capacity: number[] = []
  readonly #sent: number[] = []
  /** What a flow left unused of the last step because it ended in the middle of it. */
  readonly #unused: number[] = []
  /** Flows that are under way over each link. */
  readonly #flowsOver: number[] = []
  /** Links of the way of each flow, one flow after the other, and where it stands among those under way; -1 where it is not. */
  #ways = new Int32Array(linksMax * 1024)
  #position = new Int32Array(1024)
  #flowCount = 0
  readonly #free: FlowId[] = []
  /** What follows is of flows under way, without gaps: it is all that a step looks at. */
  #activeCount = 0
  #active = new Int32Array(1024)
  #activeWays = new Int32Array(linksMax * 1024)
  /** Bytes that it has still to bring, and those of them that are behind its first item. */
  #left = new Float64Array(1024)
  #behind = new Float64Array(1024)
  #given = new Float64Array(1024)
  /** Those that can still be given more in the step under way. */
  #open = new Int32Array(1024)
  /** Of each link in the step under way: what it can carry and carries, who shares the rest, and what each of them gets in this pass. */
  #limit = new Float64Array(0)
  #carried = new Float64Array(0)
  #sharers = new Int32Array(0)
  #part = new Float64Array(0)

  /** Bytes a second. */
  addLink(capacity: number): LinkId {
    this.#sent.push(0)
    this.#unused.push(0)
    this.#flowsOver.push(0)
    return this.#capacity.push(capacity) - 1
  }

  setCapacity(link: LinkId, capacity: number): void {
    this.#capacity[link] = capacity
  }

  capacityOf(link: LinkId): number {
    return this.#capacity[link] ?? 0
  }

  /** Bytes that have passed a link. */
  sentOver(link: LinkId): number {
    return this.#sent[link] ?? 0
  }

  /** Bytes that a flow has still to bring. */
  leftOf(flow: FlowId): number {
    const position = this.#position[flow] ?? -1
    return position < 0 ? 0 : (this.#left[position] ?? 0)
  }

  /** …of its first item. */
  leftOfFirst(flow: FlowId): number {
    const position = this.#position[flow] ?? -1
    return position < 0 ? 0 : (this.#left[position] ?? 0) - (this.#behind[position] ?? 0)
  }

  isUnderWay(flow: FlowId): boolean {
    return (this.#position[flow] ?? -1) >= 0
  }

  isFirstHere(flow: FlowId): boolean {
    return this.leftOfFirst(flow) <= minBytes
  }

  get activeFlows(): number {
    return this.#activeCount
  }

  addFlow(way: readonly LinkId[]): FlowId {
    const flow = this.#free.pop() ?? this.#flowCount++
    if (flow >= this.#position.length) this.#grow()
    for (let i = 0; i < linksMax; i++) this.#ways[flow * linksMax + i] = way[i] ?? -1
    this.#position[flow] = -1
    return flow
  }

  /** The flow is to bring another item, after all others. */
  add(flow: FlowId, bytes: number): void {
    let position = this.#position[flow] ?? -1
    if (position >= 0) {
      this.#left[position] = (this.#left[position] ?? 0) + bytes
      this.#behind[position] = (this.#behind[position] ?? 0) + bytes
      return
    }
    position = this.#activeCount++
    this.#position[flow] = position
    this.#active[position] = flow
    this.#left[position] = bytes
    this.#behind[position] = 0
    for (let i = 0; i < linksMax; i++) {
      const link = this.#ways[flow * linksMax + i] ?? -1
      this.#activeWays[position * linksMax + i] = link
      if (link >= 0) this.#flowsOver[link] = (this.#flowsOver[link] ?? 0) + 1
    }
  }

  /** The first item was taken; the next one is so long. */
  next(flow: FlowId, bytes: number): void {
    const position = this.#position[flow] ?? -1
    if (position >= 0) this.#behind[position] = (this.#behind[position] ?? 0) - bytes
  }

  /** The first item is not to be brought; the next one is so long, 0 where there is none. */
  dropFirst(flow: FlowId, next: number): void {
    const position = this.#position[flow] ?? -1
    if (position < 0) return
    const behind = this.#behind[position] ?? 0
    if (behind <= minBytes) {
      this.stop(flow)
      return
    }
    this.#left[position] = behind
    this.#behind[position] = behind - next
  }

  /** A later item of so many bytes is not to be brought. */
  drop(flow: FlowId, bytes: number): void {
    const position = this.#position[flow] ?? -1
    if (position < 0) return
    this.#left[position] = (this.#left[position] ?? 0) - bytes
    this.#behind[position] = (this.#behind[position] ?? 0) - bytes
  }

  stop(flow: FlowId): void {
    const position = this.#position[flow] ?? -1
    if (position < 0) return
    for (let at = position * linksMax; at < (position + 1) * linksMax; at++) {
      const link = this.#activeWays[at] ?? -1
      if (link < 0) break
      this.#flowsOver[link] = (this.#flowsOver[link] ?? 0) - 1
    }
    const last = --this.#activeCount
    const moved = this.#active[last] ?? 0
    this.#active[position] = moved
    this.#left[position] = this.#left[last] ?? 0
    this.#behind[position] = this.#behind[last] ?? 0
    this.#given[position] = this.#given[last] ?? 0
    this.#activeWays.copyWithin(position * linksMax, last * linksMax, (last + 1) * linksMax)
    this.#position[moved] = position
    this.#position[flow] = -1
  }

  removeFlow(flow: FlowId): void {
    this.stop(flow)
    this.#free.push(flow)
  }

  /** Moves bytes for a step of time. `here` is told of each flow whose first item is there; it must not change the network. */
  step(seconds: number, here: (flow: FlowId) => void): void {
    this.#share(seconds)
    // From the last on: the place of one that stops is taken by one that was looked at.
    for (let position = this.#activeCount - 1; position >= 0; position--) {
      const left = (this.#left[position] ?? 0) - (this.#given[position] ?? 0)
      this.#left[position] = left
      if (left - (this.#behind[position] ?? 0) > minBytes) continue
      const flow = this.#active[position] ?? 0
      here(flow)
      if (left > minBytes) continue
      this.#takeBack(position, -left)
      this.stop(flow)
    }
  }

  /** What a flow was given beyond its last byte was not sent. */
  #takeBack(position: number, bytes: number): void {
    for (let at = position * linksMax; at < (position + 1) * linksMax; at++) {
      const link = this.#activeWays[at] ?? -1
      if (link < 0) return
      this.#sent[link] = (this.#sent[link] ?? 0) - bytes
      this.#unused[link] = (this.#unused[link] ?? 0) + bytes
    }
  }

  /** What each flow may bring in this step. */
  #share(seconds: number): void {
    const links = this.#capacity.length
    if (this.#limit.length !== links) {
      this.#limit = new Float64Array(links)
      this.#carried = new Float64Array(links)
      this.#sharers = new Int32Array(links)
      this.#part = new Float64Array(links)
    }
    const [limit, carried, sharers, part] = [this.#limit, this.#carried, this.#sharers, this.#part]
    const [ways, given, stillOpen] = [this.#activeWays, this.#given, this.#open]
    for (let link = 0; link < links; link++) {
      limit[link] = (this.#capacity[link] ?? 0) * seconds + (this.#unused[link] ?? 0)
      this.#unused[link] = 0
      carried[link] = 0
      sharers[link] = this.#flowsOver[link] ?? 0
    }
    let open = this.#activeCount
    for (let position = 0; position < open; position++) {
      stillOpen[position] = position
      given[position] = 0
    }
    for (let pass = 0; pass < passes && open > 0; pass++) {
      // From what was left before the pass: the order of flows does not matter.
      for (let link = 0; link < links; link++) {
        const count = sharers[link] ?? 0
        if (count > 0) part[link] = ((limit[link] ?? 0) - (carried[link] ?? 0)) / count
      }
      for (let i = 0; i < open; i++) {
        const position = stillOpen[i] ?? 0
        const start = position * linksMax
        let share = Infinity
        let end = start
        for (; end < start + linksMax; end++) {
          const link = ways[end] ?? -1
          if (link < 0) break
          share = Math.min(share, part[link] ?? 0)
        }
        for (let at = start; at < end; at++) {
          const link = ways[at] ?? 0
          carried[link] = (carried[link] ?? 0) + share
        }
        given[position] = (given[position] ?? 0) + share
      }
      if (pass === passes - 1) break
      let kept = 0
      for (let i = 0; i < open; i++) {
        const position = stillOpen[i] ?? 0
        const start = position * linksMax
        let isFull = false
        let end = start
        for (; end < start + linksMax; end++) {
          const link = ways[end] ?? -1
          if (link < 0) break
          if ((carried[link] ?? 0) > (1 - fullShare) * (limit[link] ?? 0)) isFull = true
        }
        if (!isFull) {
          stillOpen[kept++] = position
          continue
        }
        for (let at = start; at < end; at++) {
          const link = ways[at] ?? 0
          sharers[link] = (sharers[link] ?? 0) - 1
        }
      }
      open = kept
    }
    for (let link = 0; link < links; link++) this.#sent[link] = (this.#sent[link] ?? 0) + (carried[link] ?? 0)
  }

  #grow(): void {
    const size = 2 * this.#position.length
    const larger = <Table extends Float64Array | Int32Array>(from: Table, to: Table): Table => {
      to.set(from)
      return to
    }
    this.#ways = larger(this.#ways, new Int32Array(linksMax * size))
    this.#position = larger(this.#position, new Int32Array(size))
    this.#active = larger(this.#active, new Int32Array(size))
    this.#activeWays = larger(this.#activeWays, new Int32Array(linksMax * size))
    this.#left = larger(this.#left, new Float64Array(size))
    this.#behind = larger(this.#behind, new Float64Array(size))
    this.#given = larger(this.#given, new Float64Array(size))
    this.#open = larger(this.#open, new Int32Array(size))
  }
}

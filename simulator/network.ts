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

/**
 * A fluid network: in each step of time what passes a link is shared evenly among the flows over it, and what a flow cannot use, because another
 * link of its way is full, among the others (progressive filling, a few passes of it). No packets, no losses, no queues, no
 * slow start: a flow has its share from one step to the next.
 */
export class Network {
  readonly #capacity: number[] = []
  readonly #sent: number[] = []
  #links = new Int32Array(linksMax * 1024)
  #left = new Float64Array(1024)
  #given = new Float64Array(1024)
  /** What a flow is given in the pass under way. */
  #pass = new Float64Array(1024)
  #position = new Int32Array(1024)
  #active = new Int32Array(1024)
  #open = new Int32Array(1024)
  #activeCount = 0
  #flowCount = 0
  readonly #free: FlowId[] = []
  #remaining = new Float64Array(0)
  #sharers = new Int32Array(0)

  /** Bytes a second. */
  addLink(capacity: number): LinkId {
    this.#sent.push(0)
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

  /** Bytes that a flow has still to bring before it is asked for more. */
  leftOf(flow: FlowId): number {
    return this.#left[flow] ?? 0
  }

  get activeFlows(): number {
    return this.#activeCount
  }

  addFlow(way: readonly LinkId[]): FlowId {
    const flow = this.#free.pop() ?? this.#flowCount++
    if (flow >= this.#left.length) this.#grow()
    for (let i = 0; i < linksMax; i++) this.#links[flow * linksMax + i] = way[i] ?? -1
    this.#position[flow] = -1
    return flow
  }

  /** The flow has so many bytes to bring from now on. */
  start(flow: FlowId, bytes: number): void {
    this.#left[flow] = bytes
    if ((this.#position[flow] ?? -1) >= 0) return
    this.#position[flow] = this.#activeCount
    this.#active[this.#activeCount++] = flow
  }

  stop(flow: FlowId): void {
    const position = this.#position[flow] ?? -1
    if (position < 0) return
    const last = this.#active[--this.#activeCount] ?? 0
    this.#active[position] = last
    this.#position[last] = position
    this.#position[flow] = -1
  }

  removeFlow(flow: FlowId): void {
    this.stop(flow)
    this.#free.push(flow)
  }

  /**
   * Moves bytes for a step of time. `brought` is told of each flow whose bytes are there, and returns how many more it has to bring, 0 for
   * none; it must not change the network otherwise.
   */
  step(seconds: number, brought: (flow: FlowId) => number): void {
    this.#share(seconds)
    for (let i = this.#activeCount - 1; i >= 0; i--) {
      const flow = this.#active[i] ?? 0
      const given = this.#given[flow] ?? 0
      if (given === 0) continue
      this.#count(flow, given)
      let left = (this.#left[flow] ?? 0) - given
      while (left <= 1e-6) {
        const more = brought(flow)
        if (more === 0) {
          // What it was given beyond its last byte was not sent.
          this.#count(flow, left)
          this.stop(flow)
          break
        }
        left += more
      }
      this.#left[flow] = left
    }
  }

  #count(flow: FlowId, bytes: number): void {
    for (let at = flow * linksMax; at < flow * linksMax + linksMax; at++) {
      const link = this.#links[at] ?? -1
      if (link < 0) return
      this.#sent[link] = (this.#sent[link] ?? 0) + bytes
    }
  }

  /** What each flow may bring in this step. */
  #share(seconds: number): void {
    const links = this.#capacity.length
    if (this.#remaining.length !== links) {
      this.#remaining = new Float64Array(links)
      this.#sharers = new Int32Array(links)
    }
    const remaining = this.#remaining
    const sharers = this.#sharers
    const table = this.#links
    for (let link = 0; link < links; link++) remaining[link] = (this.#capacity[link] ?? 0) * seconds
    let open = this.#activeCount
    for (let i = 0; i < open; i++) {
      const flow = this.#active[i] ?? 0
      this.#open[i] = flow
      this.#given[flow] = 0
    }
    for (let pass = 0; pass < passes && open > 0; pass++) {
      sharers.fill(0)
      for (let i = 0; i < open; i++) {
        const start = (this.#open[i] ?? 0) * linksMax
        for (let at = start; at < start + linksMax; at++) {
          const link = table[at] ?? -1
          if (link < 0) break
          sharers[link] = (sharers[link] ?? 0) + 1
        }
      }
      // From what was left before the pass: the order of flows does not matter.
      for (let i = 0; i < open; i++) {
        const flow = this.#open[i] ?? 0
        let share = Infinity
        for (let at = flow * linksMax; at < flow * linksMax + linksMax; at++) {
          const link = table[at] ?? -1
          if (link < 0) break
          const part = (remaining[link] ?? 0) / (sharers[link] ?? 1)
          if (part < share) share = part
        }
        this.#pass[flow] = share
      }
      let kept = 0
      for (let i = 0; i < open; i++) {
        const flow = this.#open[i] ?? 0
        const share = this.#pass[flow] ?? 0
        for (let at = flow * linksMax; at < flow * linksMax + linksMax; at++) {
          const link = table[at] ?? -1
          if (link < 0) break
          remaining[link] = (remaining[link] ?? 0) - share
        }
        this.#given[flow] = (this.#given[flow] ?? 0) + share
      }
      for (let i = 0; i < open; i++) {
        const flow = this.#open[i] ?? 0
        let full = false
        for (let at = flow * linksMax; at < flow * linksMax + linksMax; at++) {
          const link = table[at] ?? -1
          if (link < 0) break
          if ((remaining[link] ?? 0) < fullShare * (this.#capacity[link] ?? 0) * seconds) full = true
        }
        if (!full) this.#open[kept++] = flow
      }
      open = kept
    }
  }

  #grow(): void {
    const size = 2 * this.#left.length
    const larger = <Table extends Float64Array | Int32Array>(from: Table, to: Table): Table => {
      to.set(from)
      return to
    }
    this.#links = larger(this.#links, new Int32Array(linksMax * size))
    this.#left = larger(this.#left, new Float64Array(size))
    this.#given = larger(this.#given, new Float64Array(size))
    this.#pass = larger(this.#pass, new Float64Array(size))
    this.#position = larger(this.#position, new Int32Array(size))
    this.#active = larger(this.#active, new Int32Array(size))
    this.#open = larger(this.#open, new Int32Array(size))
  }
}

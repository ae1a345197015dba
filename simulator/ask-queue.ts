import type { Ask } from '../agent/engine/picker.ts'
import type { FlowId, Network } from './network.ts'

/** What is to be brought over one flow. */
export abstract class AskQueue {
  readonly #network: Network
  readonly asks: Ask[] = []
  readonly #here: Ask[] = []
  flow: FlowId | undefined
  /** What is asked for goes over the network already. */
  isUnderWay = false

  constructor(network: Network) {
    this.#network = network
  }

  add(ask: Ask): void {
    this.asks.push(ask)
    if (this.isUnderWay && this.flow !== undefined) this.#network.add(this.flow, ask.length)
  }

  begin(): void {
    if (this.isUnderWay || this.flow === undefined) return
    this.isUnderWay = true
    for (const ask of this.asks) this.#network.add(this.flow, ask.length)
  }

  /** Notes what is here; to be called before anything is changed. */
  collect(): void {
    if (!this.isUnderWay || this.flow === undefined) return
    while (this.asks.length > 0 && this.#network.isFirstHere(this.flow)) {
      const [ask, next] = this.asks
      if (ask) this.#here.push(ask)
      this.asks.shift()
      if (next) this.#network.next(this.flow, next.length)
    }
    this.isUnderWay = this.asks.length > 0
  }

  /** Takes what is here. */
  settle(): void {
    this.collect()
    for (let ask = this.#here.shift(); ask; ask = this.#here.shift()) this.came(ask)
  }

  /** It is not asked for any more. */
  drop(ask: Ask): boolean {
    this.collect()
    const at = this.asks.indexOf(ask)
    if (at < 0) return false
    this.asks.splice(at, 1)
    if (this.isUnderWay && this.flow !== undefined) {
      if (at > 0) this.#network.drop(this.flow, ask.length)
      else this.#network.dropFirst(this.flow, this.asks[0]?.length ?? 0)
    }
    this.isUnderWay &&= this.asks.length > 0
    return true
  }

  /** Nothing is asked for any more. */
  clear(): void {
    this.asks.length = 0
    this.isUnderWay = false
    if (this.flow !== undefined) this.#network.stop(this.flow)
  }

  abstract came(ask: Ask): void
}

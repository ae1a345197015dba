import { Worker } from 'node:worker_threads'

export interface RestingThreadOptions<Reply> {
  /** Without work for this long it ends: a thread takes 10 MiB. */
  readonly restMs: number
  readonly replied: (reply: Reply) => void
  /** It has ended in the middle of work; the next work starts another. */
  readonly lost: (error: Error) => void
}

/** A worker thread that is there while somebody needs it, and a while longer. It does not keep the process alive. */
export class RestingThread<Request, Reply> implements AsyncDisposable {
  readonly #url: URL
  readonly #options: RestingThreadOptions<Reply>
  #worker: Worker | undefined
  #needed = 0
  #timer: NodeJS.Timeout | undefined

  constructor(url: URL, options: RestingThreadOptions<Reply>) {
    this.#url = url
    this.#options = options
  }

  /** Until as many calls of `release` it does not rest; it starts now, so that the first request need not wait for that. */
  need(): void {
    this.#needed++
    clearTimeout(this.#timer)
    this.#worker ??= this.#start()
  }

  release(): void {
    if (--this.#needed > 0) return
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => {
      void this.#end()
    }, this.#options.restMs)
    this.#timer.unref()
  }

  post(request: Request): void {
    this.#worker ??= this.#start()
    this.#worker.postMessage(request)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearTimeout(this.#timer)
    await this.#end()
  }

  #start(): Worker {
    const worker = new Worker(this.#url)
    worker.unref()
    worker.on('message', this.#options.replied)
    const lost = (error: Error) => {
      if (this.#worker !== worker) return
      this.#worker = undefined
      this.#options.lost(error)
    }
    worker.on('error', (error) => {
      lost(error instanceof Error ? error : new Error(String(error)))
    })
    worker.on('exit', () => {
      lost(new Error('the thread has ended'))
    })
    return worker
  }

  async #end(): Promise<void> {
    const worker = this.#worker
    this.#worker = undefined
    await worker?.terminate()
  }
}

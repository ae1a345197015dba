/**
 * Named typed arrays over shared memory, so that several threads look at one store. They are made at their full size at once: the
 * kernel gives a page only when it is first touched, so what is reserved and never used costs no memory.
 */
export interface SharedArrays {
  /** What another thread needs to see the same arrays: pass it through `workerData`. */
  readonly buffers: ReadonlyMap<string, SharedArrayBuffer>
  u8(name: string, length: number): Uint8Array
  u32(name: string, length: number): Uint32Array
  i32(name: string, length: number): Int32Array
}

/** @throws RangeError where the machine will not reserve as much address space */
export function createSharedArrays(known?: ReadonlyMap<string, SharedArrayBuffer>): SharedArrays {
  const buffers = new Map(known)
  const buffer = (name: string, bytes: number): SharedArrayBuffer => {
    const there = buffers.get(name)
    if (there) return there
    const made = new SharedArrayBuffer(bytes)
    buffers.set(name, made)
    return made
  }
  return {
    buffers,
    u8: (name, length) => new Uint8Array(buffer(name, length)),
    u32: (name, length) => new Uint32Array(buffer(name, length * 4)),
    i32: (name, length) => new Int32Array(buffer(name, length * 4)),
  }
}

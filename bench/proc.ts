import { readFile, readdir } from 'node:fs/promises'

/** USER_HZ of every Linux that Node runs on. */
const ticksPerSecond = 100

/** User and system CPU seconds of a process, all its threads, and the children that it has waited for. @throws if it has ended */
export async function readProcessCpuSeconds(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8')
  // The second field is the name in brackets and may hold anything.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  return fields.slice(11, 15).reduce((sum, ticks) => sum + Number(ticks), 0) / ticksPerSecond
}

/** Largest resident memory of a process so far, MiB. @throws if it has ended */
export async function readPeakMemoryMiB(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8')
  return Number(/^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1]) / 1024
}

/** Resident memory of processes now, MiB; what several of them share counts once for each. @throws if one has ended */
export async function readMemoryMiB(pids: readonly number[]): Promise<number> {
  const texts = await Promise.all(pids.map((pid) => readFile(`/proc/${pid}/smaps_rollup`, 'utf8')))
  return texts.reduce((sum, text) => sum + Number(/^Rss:\s+(\d+) kB$/m.exec(text)?.[1]) / 1024, 0)
}

/** A process, its children, and theirs. */
export async function readDescendants(pid: number): Promise<number[]> {
  const threads = await readdir(`/proc/${pid}/task`)
  const children = await Promise.all(
    threads.map((thread) => readFile(`/proc/${pid}/task/${thread}/children`, 'utf8').catch(() => '')),
  )
  const pids = children.flatMap((text) => text.trim().split(' ')).filter((text) => text !== '')
  return [pid, ...(await Promise.all(pids.map((child) => readDescendants(Number(child))))).flat()]
}

/** CPU time of the whole machine since it started, all cores together. */
export async function readTotalCpu(): Promise<{ busySeconds: number; totalSeconds: number }> {
  const [, ...fields] =
    (await readFile('/proc/stat', 'utf8')).split('\n')[0]?.trim().split(/\s+/).map(Number) ?? []
  const total = fields.slice(0, 8).reduce((sum, ticks) => sum + ticks, 0)
  const idle = (fields[3] ?? 0) + (fields[4] ?? 0)
  return { busySeconds: (total - idle) / ticksPerSecond, totalSeconds: total / ticksPerSecond }
}

/** Follows a process until it ends and keeps its last figures: a process that has ended can no longer be asked. */
export function watchProcess(
  pid: number,
  everyMs = 10,
): { end(): { cpuSeconds: number; peakMemoryMiB: number } } {
  const last = { cpuSeconds: 0, peakMemoryMiB: 0 }
  let running = true
  const timer = setInterval(() => {
    void Promise.all([readProcessCpuSeconds(pid), readPeakMemoryMiB(pid)]).then(
      ([cpuSeconds, peakMemoryMiB]) => {
        if (!running) return
        last.cpuSeconds = Math.max(last.cpuSeconds, cpuSeconds)
        if (peakMemoryMiB > 0) last.peakMemoryMiB = peakMemoryMiB
      },
      () => {
        running = false
      },
    )
  }, everyMs)
  return {
    end: () => {
      clearInterval(timer)
      return last
    },
  }
}

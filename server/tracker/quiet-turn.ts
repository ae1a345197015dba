/**
 * Waits for a turn of the event loop with little to do, at most so many. The kernel resets connections that it has taken for a port and the
 * program has not: right after such a turn there are next to none. (With net.ipv4.tcp_migrate_req=1 it gives them to the other program.)
 */
export async function quietTurn(): Promise<void> {
  for (let turns = 0; turns < 200; turns++) {
    const startMs = performance.now()
    await new Promise((resolve) => setImmediate(resolve))
    if (performance.now() - startMs < 0.2) return
  }
}

// Runs a scenario. In: Scenario, as workerData. Out: SimulationNews.
import { parentPort, workerData } from 'node:worker_threads'
import type { Scenario } from './scenario.ts'
import { simulate } from './simulate.ts'
import type { SimulationNews } from './thread.ts'

function tell(news: SimulationNews): void {
  parentPort?.postMessage(news)
}

tell({
  result: simulate(workerData as Scenario, (seconds, hosts) => {
    tell({ seconds, hosts })
  }),
})

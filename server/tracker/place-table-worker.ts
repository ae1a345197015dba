// Reads a place table, so that announces need not wait for it. In: PlaceTableOrder, as workerData. Out: PlaceTableAnswer.
import { parentPort, workerData } from 'node:worker_threads'
import { ConfigError } from '../../lib/runtime/config.ts'
import type { PlaceTableAnswer, PlaceTableOrder } from './place-table.ts'
import { loadPlaceTable } from './place-table.ts'

parentPort?.postMessage(answer(workerData as PlaceTableOrder))

function answer({ file, prefixes }: PlaceTableOrder): PlaceTableAnswer {
  try {
    return { table: loadPlaceTable(file, prefixes) }
  } catch (error) {
    if (error instanceof ConfigError) return { faults: error.faults }
    throw error
  }
}

import { createRackswarmEngine } from '../../../agent/engine/rackswarm.ts'
import { engineContract } from './engine.contract.ts'

engineContract('rackswarm', (config) =>
  createRackswarmEngine(config, { monotonic: () => performance.now(), random: Math.random }),
)

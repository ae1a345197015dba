import { createWebtorrentEngine } from '../../../agent/engine/webtorrent.ts'
import { engineContract } from './engine.contract.ts'

engineContract('webtorrent', (config) =>
  createWebtorrentEngine(config, { now: Date.now, random: Math.random }),
)

import { createWebtorrentEngine } from '../../../agent/engine/webtorrent/webtorrent.ts'
import { engineContract } from './engine.contract.ts'

engineContract('webtorrent', (config) =>
  createWebtorrentEngine(config, { monotonic: () => performance.now(), random: Math.random }),
)

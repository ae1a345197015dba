// Own engines as tests want them: on free ports, stopped with the test.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import type { TestContext } from 'node:test'
import type { Engine, EngineConfig, EngineHandle, EnginePeer } from '../../../agent/engine/engine.ts'
import { createRackswarmEngine } from '../../../agent/engine/rackswarm.ts'
import type { Blob } from './fixtures.ts'
import { blobFile, peerAt, peerFeed, withDeadline } from './fixtures.ts'

export const unlimited = { downloadBytesPerSecond: undefined, uploadBytesPerSecond: undefined }

export function engineConfig(config: Partial<EngineConfig> = {}): EngineConfig {
  return {
    port: 0,
    connectionsMax: 30,
    identity: { host: 'test', place: 'rack-1' },
    limits: unlimited,
    ...config,
  }
}

export async function startEngine(t: TestContext, config: Partial<EngineConfig> = {}): Promise<Engine> {
  const engine = await createRackswarmEngine(engineConfig(config), {
    monotonic: () => performance.now(),
    random: Math.random,
  })
  t.after(() => engine[Symbol.asyncDispose]())
  return engine
}

export interface Seeder {
  readonly engine: Engine
  readonly handle: EngineHandle
  readonly peer: EnginePeer
  readonly file: string
}

/** An engine that seeds the blob. */
export async function startSeeder(
  t: TestContext,
  directory: string,
  blob: Blob,
  config: Partial<EngineConfig> = {},
): Promise<Seeder> {
  const engine = await startEngine(t, config)
  const file = await blobFile(directory, `seed-${engine.port}`, blob.bytes)
  const handle = engine.seed({
    metainfo: blob.metainfo,
    file,
    peers: peerFeed(),
    signal: new AbortController().signal,
  })
  await handle.done
  return { engine, handle, peer: peerAt(engine.port), file }
}

export function startFetch(
  engine: Engine,
  blob: Blob,
  file: string,
  peers: AsyncIterable<EnginePeer>,
): EngineHandle {
  return engine.fetch({
    metainfo: blob.metainfo,
    file,
    peers,
    webseed: undefined,
    signal: new AbortController().signal,
  })
}

export async function assertFetched(
  handle: EngineHandle,
  blob: Blob,
  file: string,
  seconds = 45,
): Promise<void> {
  await withDeadline(
    handle.done,
    () => `the fetch; ${handle.waitingReason ?? ''} ${JSON.stringify(handle.peers())}`,
    seconds,
  )
  assert.equal(handle.bytesVerified, blob.bytes.length)
  assert.ok((await readFile(file)).equals(blob.bytes), 'the bytes are those of the blob')
}

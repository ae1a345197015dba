import { backoff, delay } from '../../../lib/runtime/backoff.ts'
import { endpoint } from '../../../lib/protocol/address.ts'
import { ClientError } from '../../../lib/protocol/errors.ts'
import type { InfoHash } from '../../../lib/protocol/infohash.ts'
import type { SwarmCounts } from '../../../lib/protocol/scrape.ts'
import type { Logger } from '../../../lib/runtime/log.ts'
import { RedisUnavailable } from '../../redis/connection.ts'
import type { MemoryPeerStore } from '../memory/memory-peer-store.ts'
import type { PeerStore, StoreAnnounce, StoreReply, StoreStatus } from '../peer-store.ts'
import { PeerSample } from '../peer-store.ts'
import type { Plan } from '../selection.ts'
import { rootPlace } from '../topology.ts'
import type { Untold } from './backlog.ts'
import { Backlog, compactKey, endpointKey } from './backlog.ts'
import type { Scope } from './circuits.ts'
import { Circuits } from './circuits.ts'
import { RecentReplies, addPeers, copySample } from './recent-replies.ts'
import type { StoppedPeer } from './stop-files.ts'

export interface ResilientPeerStoreOptions {
  /** The store that all servers share. It may be slow, and it may fail. */
  readonly shared: PeerStore
  /** What this server has been told itself, in its memory; disposed by whoever made it. */
  readonly local: Pick<MemoryPeerStore, 'announce' | 'scrape' | 'swarms' | 'totals' | 'prolong' | 'forget'>
  /** The shared store is of several parts, and some of them may be gone. */
  readonly isPartitioned: boolean
  /** No announce waits longer for the shared store. */
  readonly deadlineMs: number
  /** How long after the shared store named a peer it is handed out unasked. */
  readonly staleMs: number
  /** How long announces are answered without the shared store; then they are refused. */
  readonly degradedMaxMs: number
  /** How many peers a second the shared store is told of late. */
  readonly toldPerSecond: number
  /** Peers that wait for it at most. */
  readonly untoldMax: number
  /** The first look whether it answers again comes after this. Default: 100 ms. */
  readonly probeFirstMs?: number
  /** Servers begin to tell what they have to within this time of each other. Default: 1 s. */
  readonly tellJitterMs?: number
  /** Told of each peer that stops here, and whether the shared store was told: other servers may not be able to ask it. */
  readonly stopped?: (peer: StoppedPeer, isTold: boolean) => void
  /** Milliseconds of a clock that never goes back. */
  readonly now: () => number
  /** 0 ≤ random() < 1. */
  readonly random: () => number
  readonly log: Logger
}

export interface ResilientPeerStore extends PeerStore {
  /** A peer has stopped at a server that cannot tell the shared store: it is told from here, once it answers. */
  stoppedElsewhere(peer: StoppedPeer, ageMs: number): void
}

/** Between two looks whether it answers again at most. */
const probeMaxMs = 1000
/** Peers told at once. */
const tellTogether = 32
/** How long the end of the server may be held up by what is untold. */
const tellAtEndMs = 2000
/** Lives are jittered by a tenth up and down: one that is longer by this factor is longer for another reason. */
const beyondJitter = 1.25

/**
 * A store that several servers share, as one server uses it: degraded, not down. Every announce is recorded in this server's memory too.
 *
 * - While the shared store answers, its answer is the answer.
 * - An announce that it does not answer by the deadline, or that it fails, is answered from what this server has been told itself, and from whom
 *   the shared store has named within `staleMs`. From then on it is not asked until it has been seen to answer, so no announce waits.
 *   Stops that other servers hear of meanwhile it knows where they share a directory (stop-files.ts); where peers move to it cannot know.
 * - When it answers again it is told what it has missed: the newest of each peer, bounded in number and in rate. It keeps what it has been told
 *   by others since. Until it has been told all of a swarm, answers are those of both together.
 *
 * @throws ClientError `degraded` from `announce` and `scrape` once it has not answered for `degradedMaxMs`
 */
export function createResilientPeerStore(options: ResilientPeerStoreOptions): ResilientPeerStore {
  const { shared, local, isPartitioned, deadlineMs, staleMs, degradedMaxMs, now, random, log } = options
  const { probeFirstMs = 100, tellJitterMs = 1000 } = options
  const circuits = new Circuits(now)
  const backlog = new Backlog(options.untoldMax)
  const recent = new RecentReplies({ staleMs, now })
  const ending = new AbortController()
  /** What waits for the shared store, in the order in which it began to. */
  const waiting = new Set<Waiting>()
  /** The announce of each peer that was asked for last and is not answered yet. */
  const latest = new Map<string, StoreAnnounce>()
  const recoveries = new Set<Promise<void>>()
  let telling: Promise<void> | undefined
  let lastFault = ''
  let answeredLocally = 0
  let told = 0

  const refuseWhereTooLate = (infoHash: InfoHash) => {
    const since = circuits.openSince(infoHash)
    if (since !== undefined && now() - since > degradedMaxMs) throw tooLong(degradedMaxMs)
  }

  /** Asks the shared store, for `deadlineMs` at most. Whatever it does not do is told to the circuits. */
  const ask = <Answer>(
    infoHash: InfoHash,
    question: () => Answer | Promise<Answer>,
    answered: (answer: Answer) => void,
    failed: () => void,
  ): void => {
    const call: Waiting = {
      infoHash,
      giveUp: () => {
        clearTimeout(timer)
        if (waiting.delete(call)) failed()
      },
    }
    const fault = (error: unknown) => {
      const isOpened = waiting.has(call)
      if (isOpened) open(infoHash, error)
      call.giveUp()
    }
    const timer = setTimeout(() => {
      fault(new RedisUnavailable(`no answer within ${deadlineMs} ms`))
    }, deadlineMs)
    waiting.add(call)
    const succeeded = (answer: Answer) => {
      clearTimeout(timer)
      if (!waiting.delete(call)) return
      circuits.succeeded()
      answered(answer)
    }
    try {
      const answer = question()
      if (answer instanceof Promise) answer.then(succeeded, fault)
      else succeeded(answer)
    } catch (error) {
      fault(error)
    }
  }

  const open = (infoHash: InfoHash, error: unknown) => {
    lastFault = error instanceof Error ? error.message : String(error)
    const scope = circuits.failed(infoHash, !isPartitioned && error instanceof RedisUnavailable)
    if (scope === undefined) return
    log.warn(
      { reason: lastFault, swarms: scope === 'all' ? 'all' : 'one' },
      'the shared store of swarms does not answer; announces are answered from what this server knows',
    )
    // Whoever waits would only wait for the deadline.
    for (const call of waiting) if (scope === 'all' || call.infoHash === scope) call.giveUp()
    const recovery = recover(scope, infoHash).finally(() => {
      recoveries.delete(recovery)
    })
    recoveries.add(recovery)
  }

  /** Looks until it answers again. */
  const recover = async (scope: Scope, infoHash: InfoHash): Promise<void> => {
    const isIn = (other: InfoHash) => scope === 'all' || other === scope
    for (const delayMs of backoff({ firstMs: probeFirstMs, maxMs: probeMaxMs, random })) {
      await delay(delayMs, ending.signal).catch(() => undefined)
      if (ending.signal.aborted) return
      // Of a server that can be read but not written, a write says more.
      const [entry] = backlog.first(1, isIn)
      if (await (entry ? tell(entry) : canScrape(infoHash))) break
      // A part that is gone says nothing of the others.
      if (entry) backlog.postpone(entry.infoHash)
    }
    circuits.close(scope)
    log.info({ untold: backlog.size }, 'the shared store of swarms answers again')
    startTelling()
  }

  const canScrape = (infoHash: InfoHash) =>
    new Promise<boolean>((resolve) => {
      ask(
        infoHash,
        () => shared.scrape(infoHash),
        () => {
          resolve(true)
        },
        () => {
          resolve(false)
        },
      )
    })

  /** @returns whether it took it */
  const tell = async (entry: Untold): Promise<boolean> => {
    for (const step of belatedAnnounces(entry, now)) {
      const isTold = await new Promise<boolean>((resolve) => {
        ask(
          entry.infoHash,
          async () => {
            try {
              return await shared.announce(step)
            } catch (error) {
              // Another time it would not take it either, and all others wait behind it.
              if (!(error instanceof RedisUnavailable)) backlog.drop(entry)
              throw error
            }
          },
          () => {
            resolve(true)
          },
          () => {
            resolve(false)
          },
        )
      })
      if (!isTold) return false
    }
    told++
    backlog.remove(entry)
    return true
  }

  const startTelling = () => {
    telling ??= tellAll(random() * tellJitterMs).finally(() => {
      telling = undefined
    })
  }

  /** Tells of whatever may be told, at a bounded rate: of those that have stopped at once, of the others after a while. */
  const tellAll = async (othersAfterMs: number): Promise<void> => {
    let waitMs = 0
    for (let othersToo = false; ;) {
      await delay(waitMs, ending.signal).catch(() => undefined)
      if (ending.signal.aborted) return
      const next = nextToTell()
      if (next.length === 0) return
      const entries = othersToo ? next : next.filter(({ stopped }) => stopped)
      await Promise.all(entries.map(tell))
      waitMs = (entries.length / options.toldPerSecond) * 1000
      if (entries.length > 0) continue
      othersToo = true
      waitMs = othersAfterMs
    }
  }
  const nextToTell = () =>
    backlog.first(
      Math.min(tellTogether, options.toldPerSecond),
      (infoHash) => circuits.openSince(infoHash) === undefined,
    )

  /** @param lasting the reply is promised, so its sample must last */
  const answerLocally = (announce: StoreAnnounce, lasting: boolean): StoreReply => {
    refuseWhereTooLate(announce.infoHash)
    const atMs = now()
    let lifeMs = 0
    const fresh = recent.freshCounts(announce.infoHash)
    const { counts, peers } = local.announce(
      partly(announce, {
        lifetimeMs: (here) => (lifeMs = announce.lifetimeMs(larger(here, fresh))),
        choose: (view) => announce.choose(view),
      }),
    )
    backlog.note(announce, { atMs, dueMs: atMs + lifeMs })
    if (announce.event === 'stopped') options.stopped?.(announce, false)
    // Only a failed call came here with its circuit closed again; nobody else would tell.
    if (circuits.openSince(announce.infoHash) === undefined) startTelling()
    answeredLocally++
    const wanted = announce.numwant ?? numwantDefault
    const sample = lasting || fresh ? copySample(peers, wanted) : peers
    recent.addTo(sample, announce, endpoint(announce.source, announce.port).compact)
    return { counts: larger(counts, fresh), peers: sample }
  }

  /** In this server's memory; nobody is chosen. @returns for how long */
  const record = (announce: StoreAnnounce): number => {
    const known = recent.lastCounts(announce.infoHash)
    let lifeMs = 0
    local.announce(
      partly(announce, {
        lifetimeMs: (here) => (lifeMs = announce.lifetimeMs(larger(here, known))),
        choose: () => nobody,
      }),
    )
    return lifeMs
  }

  const askShared = (announce: StoreAnnounce): Promise<StoreReply> => {
    const recordedMs = record(announce)
    const { number } = backlog
    const key = `${announce.infoHash}${endpointKey(announce)}`
    latest.set(key, announce)
    /** Whether the peer has not announced again meanwhile: else it is known better. */
    const isLatest = () => latest.get(key) === announce && latest.delete(key)
    let givenMs = 0
    const question = partly(announce, {
      lifetimeMs: (counts) => (givenMs = announce.lifetimeMs(counts)),
      choose: (view) => announce.choose(view),
    })
    return new Promise((resolve) => {
      ask(
        announce.infoHash,
        () => shared.announce(question),
        (reply) => {
          backlog.told(announce, number)
          if (announce.event === 'stopped') options.stopped?.(announce, true)
          if (givenMs > recordedMs * beyondJitter) local.prolong(announce, givenMs)
          recent.remember(announce, reply)
          const isWhole = !backlog.hasSwarm(announce.infoHash)
          resolve(isLatest() && !isWhole ? together(announce, reply) : reply)
        },
        () => {
          resolve(Promise.try(() => (isLatest() ? answerLocally(announce, true) : unheard(announce))))
        },
      )
    })
  }

  /** The peer has announced again and been heard: this reply goes to one that does not wait for it. */
  const unheard = ({ infoHash }: StoreAnnounce): StoreReply => ({
    counts: larger(local.scrape(infoHash), recent.freshCounts(infoHash)),
    peers: new PeerSample(0),
  })

  /** The shared store has not been told of all of the swarm yet: its answer, and what this server knows. */
  const together = (announce: StoreAnnounce, { counts, peers }: StoreReply): StoreReply => {
    const wanted = announce.numwant ?? numwantDefault
    const sample = copySample(peers, wanted)
    sample.keep((compact) => !backlog.hasStopped(announce.infoHash, compactKey(compact)))
    const here = local.announce(
      partly(announce, {
        lifetimeMs: (all) => announce.lifetimeMs(larger(all, counts)),
        choose: (view) => announce.choose(view),
      }),
    )
    addPeers(sample, here.peers, wanted)
    return { counts: larger(counts, here.counts), peers: sample }
  }

  return {
    announce: (announce) => {
      if (announce.event === 'stopped')
        recent.stopped(announce.infoHash, endpoint(announce.source, announce.port).compact)
      if (circuits.openSince(announce.infoHash) === undefined) return askShared(announce)
      return answerLocally(announce, false)
    },
    scrape: (infoHash) => {
      const here = () => {
        refuseWhereTooLate(infoHash)
        return larger(local.scrape(infoHash), recent.freshCounts(infoHash))
      }
      if (circuits.openSince(infoHash) !== undefined) return here()
      return new Promise((resolve) => {
        ask(
          infoHash,
          () => shared.scrape(infoHash),
          (counts) => {
            resolve(backlog.hasSwarm(infoHash) ? larger(counts, local.scrape(infoHash)) : counts)
          },
          () => {
            resolve(Promise.try(here))
          },
        )
      })
    },
    stoppedElsewhere: ({ infoHash, source, port }, ageMs) => {
      recent.stopped(infoHash, endpoint(source, port).compact)
      const atMs = now() - ageMs
      backlog.noteStop(stopOf({ infoHash, source, port }), atMs)
      if (circuits.openSince(infoHash) === undefined) startTelling()
    },
    swarms: () => (circuits.allSince === undefined ? shared : local).swarms(),
    totals: () => {
      const { refused } = shared.totals()
      return { ...(circuits.allSince === undefined ? shared : local).totals(), refused }
    },
    status: (): StoreStatus => {
      const { anySince, allSince } = circuits
      return {
        degraded:
          anySince === undefined
            ? undefined
            : {
                sinceMs: now() - anySince,
                reason: lastFault,
                isRefusing: allSince !== undefined && now() - allSince > degradedMaxMs,
              },
        answeredLocally,
        untold: backlog.size,
        told,
        dropped: backlog.dropped,
      }
    },
    [Symbol.asyncDispose]: async () => {
      // What was not told yet, if it answers.
      const lastMs = now() + tellAtEndMs
      while (backlog.size > 0 && circuits.allSince === undefined && now() < lastMs)
        await Promise.all(nextToTell().map(tell))
      ending.abort()
      await Promise.allSettled([...recoveries, telling])
      for (const call of waiting) call.giveUp()
      await shared[Symbol.asyncDispose]()
    },
  }
}

interface Waiting {
  readonly infoHash: InfoHash
  giveUp(): void
}

/** Of a client that does not say. */
const numwantDefault = 50
const noPeerId = new Uint8Array(20)
const nobody: Plan = { rack: 0, seeders: [], leechers: [], gateway: false }

function tooLong(degradedMaxMs: number): ClientError {
  return new ClientError(
    'degraded',
    `the tracker has not reached its store of swarms for ${Math.round(degradedMaxMs / 60_000)} minutes`,
    { retryInMinutes: 1 },
  )
}

/** The same announce, heard with other ears. Announces have getters, which a spread would not copy. */
function partly(announce: StoreAnnounce, ears: Pick<StoreAnnounce, 'lifetimeMs' | 'choose'>): StoreAnnounce {
  return {
    infoHash: announce.infoHash,
    source: announce.source,
    port: announce.port,
    peerId: announce.peerId,
    raw: announce.raw,
    place: announce.place,
    ancestors: announce.ancestors,
    left: announce.left,
    event: announce.event,
    ownFamilyOnly: announce.ownFamilyOnly,
    withPeerIds: announce.withPeerIds,
    numwant: announce.numwant,
    ...ears,
  }
}

/** A stop of which nothing else is known: the shared store knows where the peer was. */
function stopOf(peer: StoppedPeer): StoreAnnounce {
  return {
    ...peer,
    peerId: noPeerId,
    raw: undefined,
    place: rootPlace,
    ancestors: [],
    left: 1,
    event: 'stopped',
    ownFamilyOnly: false,
    withPeerIds: false,
    numwant: 0,
    lifetimeMs: () => 0,
    choose: () => nobody,
  }
}

/** What the shared store is told of a peer late: its completion, if others came after it, and how it is now. */
function belatedAnnounces(entry: Untold, now: () => number): StoreAnnounce[] {
  const { infoHash, source, port, peerId, place, ancestors, left, completed, stopped, atMs, dueMs } = entry
  const gone = dueMs <= now()
  const step = (change: Pick<StoreAnnounce, 'left' | 'event'>): StoreAnnounce => ({
    infoHash,
    source,
    port,
    peerId,
    place,
    ancestors,
    ownFamilyOnly: true,
    withPeerIds: false,
    numwant: 0,
    belatedMs: now() - atMs,
    lifetimeMs: () => Math.max(shortestLifeMs, dueMs - now()),
    choose: () => nobody,
    ...change,
  })
  const stop = step({ left, event: 'stopped' })
  if (stopped) return completed ? [step({ left: 0, event: 'completed' }), stop] : [stop]
  if (gone) return completed ? [step({ left: 0, event: 'completed' }), stop] : []
  if (completed && left > 0) return [step({ left: 0, event: 'completed' }), step({ left, event: undefined })]
  return [step({ left, event: completed ? 'completed' : undefined })]
}

/** Of a peer that is only told of for its completion. */
const shortestLifeMs = 1000

function larger(one: SwarmCounts, other: SwarmCounts | undefined): SwarmCounts {
  if (other === undefined) return one
  return {
    complete: Math.max(one.complete, other.complete),
    incomplete: Math.max(one.incomplete, other.incomplete),
    downloaded: Math.max(one.downloaded, other.downloaded),
  }
}

import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { isLoopback, parseIp } from '../lib/protocol/address.ts'
import { ConfigError } from '../lib/runtime/config.ts'
import { makeSecret, readOrMakeSecret, readSecret } from '../lib/runtime/secret-file.ts'
import type { KeySetSource } from '../lib/token/key-set.ts'
import type { ServerConfig } from './config.ts'
import { MemoryStorage, RedisStorage } from './config.ts'
import type { RedisSettings } from './redis/connection.ts'
import type { TlsMaterial } from './tracker/http-tls.ts'
import type { TopologyConfig } from './tracker/topology.ts'
import type { TrackerConfig } from './tracker/tracker.ts'
import type { StorageSettings } from './tracker/tracker-service.ts'
import type { ListenAddress, TrackerSettings } from './tracker/tracker-thread.ts'

/** The secrets of a tracker, and where they come from if not from the configuration. */
export interface TrackerSecrets {
  readonly udpPrivateKey: string
  readonly ticketSecret: string
}

/**
 * Without a data directory a secret that is given nowhere is good for this start alone.
 *
 * @throws Error naming the file that is missing or that others can read
 */
export async function openTrackerSecrets(
  { udp, tokens }: ServerConfig,
  dataDirectory: string | undefined,
  environment: NodeJS.ProcessEnv,
): Promise<TrackerSecrets> {
  const secret = async (text: string | undefined, file: string | undefined, own: string) => {
    if (text !== undefined && text !== '') return text
    if (file !== undefined) return readSecret(file)
    return dataDirectory === undefined ? makeSecret() : readOrMakeSecret(join(dataDirectory, own))
  }
  const udpPrivateKey = await secret(
    udp.private_key ?? environment['RACKSWARM_UDP_PRIVATE_KEY'],
    udp.private_key_file,
    'udp-private-key',
  )
  if (udpPrivateKey.length < privateKeyCharactersMin)
    throw new ConfigError([
      `udp: the secret of the connection ids (private_key_file, or RACKSWARM_UDP_PRIVATE_KEY) has ${udpPrivateKey.length} characters, need ${privateKeyCharactersMin} or more`,
    ])
  return {
    udpPrivateKey,
    ticketSecret: await secret(
      environment['RACKSWARM_TICKET_SECRET'],
      tokens.ticket_secret_file,
      'ticket-secret',
    ),
  }
}

const privateKeyCharactersMin = 16

/** Reads the PEM files of `http.tls`. @throws ConfigError naming the file that cannot be read */
export async function readTlsMaterial({ tls }: ServerConfig['http']): Promise<TlsMaterial | undefined> {
  if (!tls) return undefined
  const read = async (file: string, key: string) =>
    readFile(file).catch((cause: unknown) => {
      throw new ConfigError([`http.tls.${key}: cannot read ${file}: ${(cause as Error).message}`], { cause })
    })
  const [cert, key] = [await read(tls.cert, 'cert'), await read(tls.key, 'key')]
  if (tls.client_ca === undefined) return { cert, key }
  return {
    cert,
    key,
    clientCa: await read(tls.client_ca, 'client_ca'),
    clientCertificates: tls.client_certificates,
  }
}

/** Where tokens are checked with: the registry of this server, or a key set from elsewhere. */
export interface Trust {
  readonly issuer: string
  readonly audience: string
  readonly keySet: KeySetSource | undefined
}

/** What the tracker's room makes of server.yaml. `mainPort` says whether the main port is one of its own. */
export function trackerSettings(
  config: ServerConfig,
  options: {
    mainPort: boolean
    topology: TopologyConfig
    trust: Trust
    tls: TlsMaterial | undefined
    secrets: TrackerSecrets
    epoch: string
    modulesDirectory: string
  },
): TrackerSettings {
  const { http, udp, tracker, tokens } = config
  const { trust, secrets } = options
  return {
    epoch: options.epoch,
    topology: options.topology,
    config: trackerConfigOf(config),
    prehooks: config.prehooks,
    posthooks: config.posthooks,
    modulesDirectory: options.modulesDirectory,
    approval:
      tracker.approval === 'none'
        ? undefined
        : {
            scrapeNetworks: tracker.scrape_networks,
            issuer: trust.issuer,
            audience: trust.audience,
            clockToleranceMs: tokens.clock_tolerance,
            acceptChihaya: tokens.compat === 'chihaya',
            ticketSecret: secrets.ticketSecret,
            keySet: trust.keySet,
          },
    http: {
      listeners: [
        ...(options.mainPort ? [{ ...http.addr, tls: http.tls?.main_port ?? false }] : []),
        ...http.tracker_addr.map((address) => ({ ...address, tls: false })),
        ...http.tls_addr.map((address) => ({ ...address, tls: true })),
      ],
      settings: {
        routes: { announce: http.announce_routes, scrape: http.scrape_routes },
        connectionsMax: http.connections_max,
        headTimeoutMs: http.request_timeout,
        idleTimeoutMs: http.idle_timeout,
        trustedProxies: http.trusted_proxies,
        forwardedHeader: http.real_ip_header,
      },
      tls: options.tls,
      proxyProtocol: http.proxy_protocol,
    },
    udp: {
      addresses: udp.addr ?? loopbackOf(http.addr),
      privateKey: secrets.udpPrivateKey,
      connectionIdLifetimeMs: udp.connection_id_lifetime,
      maxClockSkewMs: udp.max_clock_skew,
    },
  }
}

/** What decides over an announce. */
export function trackerConfigOf(config: ServerConfig): TrackerConfig {
  const { tracker } = config
  return {
    announceIntervalMs: config.announce_interval,
    minAnnounceIntervalMs: config.min_announce_interval,
    numwantDefault: tracker.numwant_default,
    numwantMax: tracker.numwant_max,
    scrapeMax: tracker.scrape_max,
    gatewaysPerRack: tracker.gateways_per_rack,
    reservePeers: tracker.reserve_peers,
    trustedAnnouncers: tracker.trusted_announcers,
    fullScrapeNetworks: tracker.full_scrape_networks,
  }
}

export function storageSettings(
  { storage, registry }: ServerConfig,
  dataDirectory: string | undefined,
  redis: RedisSettings | undefined,
): StorageSettings {
  if (storage.name === 'redis') {
    if (!redis) throw new ConfigError(['storage.name: needs a Redis: say where it is in redis.url'])
    const { staleness, degraded_max, ...own } = RedisStorage.parse(storage.config)
    return {
      name: 'redis',
      redis,
      peersMax: own.peers_max,
      swarmsMax: own.swarms_max,
      resilience: {
        staleMs: staleness,
        degradedMaxMs: degraded_max === 'forever' ? Infinity : degraded_max,
        toldPerSecond: own.reconcile_rate,
        untoldMax: own.untold_max,
      },
      stops: registry.shared_dir === undefined ? undefined : join(registry.shared_dir, 'stops'),
    }
  }
  if (storage.name !== 'memory') return { name: 'module', path: storage.name, config: storage.config }
  const memory = MemoryStorage.parse(storage.config)
  return {
    name: 'memory',
    peersMax: memory.peers_max,
    swarmsMax: memory.swarms_max,
    snapshot:
      memory.snapshot && dataDirectory !== undefined
        ? { file: join(dataDirectory, 'swarms.snapshot'), intervalMs: memory.snapshot_interval }
        : undefined,
  }
}

/** UDP listens beside the main port where nobody from outside can reach it; elsewhere it must be asked for. */
function loopbackOf({ host, port }: ListenAddress): ListenAddress[] {
  const ip = host === 'localhost' ? parseIp('127.0.0.1') : parseIp(host)
  return ip && isLoopback(ip) ? [{ host: host === 'localhost' ? '127.0.0.1' : host, port }] : []
}

import type { ServerConfig } from './config.ts'

/** What a reload puts in force; every other setting, those that are yet to come too, counts at the next start. */
const live = [
  'log_level',
  'announce_interval',
  'min_announce_interval',
  'http.tls.cert',
  'http.tls.key',
  'http.insecure_plaintext',
  'http.trusted_proxies',
  'http.real_ip_header',
  'http.request_timeout',
  'http.idle_timeout',
  'http.connections_max',
  'udp.insecure_plaintext',
  'tracker',
  'prehooks',
  'topology',
]
/** The listeners of the tracker take these too; the main port of a registry, which is another program, does not. */
const liveWithoutRegistry = [
  'http.announce_routes',
  'http.scrape_routes',
  'http.tls.client_ca',
  'http.tls.client_certificates',
]

/** Settings that are not as they were at the start, and only count after a restart: `storage.config.peers_max`. */
export function restartNeeded(start: ServerConfig, next: ServerConfig): string[] {
  const taken = start.roles.includes('registry') ? live : [...live, ...liveWithoutRegistry]
  return differences(start, next, '').filter(
    (path) => !taken.some((setting) => path === setting || path.startsWith(`${setting}.`)),
  )
}

/** Paths of what differs; a section that is only there once is one difference. */
function differences(a: unknown, b: unknown, path: string): string[] {
  if (!isSection(a) || !isSection(b)) return JSON.stringify(a) === JSON.stringify(b) ? [] : [path]
  return [...new Set([...Object.keys(a), ...Object.keys(b)])].flatMap((key) =>
    differences(a[key], b[key], path === '' ? key : `${path}.${key}`),
  )
}

function isSection(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

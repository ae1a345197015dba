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

/** What the reload of a server puts in force, or sections of it. */
export function liveSettings({ roles }: ServerConfig): readonly string[] {
  return roles.includes('registry') ? live : [...live, ...liveWithoutRegistry]
}

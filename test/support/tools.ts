import { spawnSync } from 'node:child_process'
import { existsSync, globSync } from 'node:fs'

/** What comes with each Debian package that may be needed. */
const files = {
  iproute2: '/usr/sbin/ip',
  ethtool: '/usr/sbin/ethtool',
  aria2: '/usr/bin/aria2c',
  'transmission-daemon': '/usr/bin/transmission-daemon',
  skopeo: '/usr/bin/skopeo',
  'docker-registry': '/usr/bin/docker-registry',
  'redis-server': '/usr/bin/redis-server',
  'redis-sentinel': '/usr/bin/redis-sentinel',
  faketime: '/usr/bin/faketime',
  containerd: '/usr/bin/containerd',
  podman: '/usr/bin/podman',
  openssl: '/usr/bin/openssl',
  strace: '/usr/bin/strace',
  haproxy: '/usr/sbin/haproxy',
  udpcast: '/usr/bin/udp-sender',
  'python3-libtorrent': '/usr/lib/python3/dist-packages/libtorrent.*.so',
}
export type ToolPackage = keyof typeof files

/** Installs with apt what is missing. @throws Error saying what to install where that is not possible */
export function installTools(packages: readonly ToolPackage[]): void {
  const missing = () => packages.filter((name) => globSync(files[name]).length === 0)
  const wanted = missing()
  if (wanted.length === 0) return
  const byHand = `install these Debian packages and run it again: apt-get install ${wanted.join(' ')}`
  if (process.getuid?.() !== 0 || !existsSync('/usr/bin/apt-get'))
    throw new Error(`Real peers are needed: ${byHand}`)
  process.stderr.write(`Installing ${wanted.join(', ')} with apt-get\n`)
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  const apt = (...args: string[]) =>
    spawnSync('apt-get', ['-qq', '-y', '-o', 'Dpkg::Use-Pty=0', ...args], {
      env,
      stdio: ['ignore', 'ignore', 2],
    }).status === 0
  const install = () => apt('install', '--no-install-recommends', ...wanted)
  // The lists of a machine may be old or not there.
  if (!install() && !(apt('update') && install())) throw new Error(`apt-get failed, see above; ${byHand}`)
  if (missing().length > 0) throw new Error(`${missing().join(', ')} did not bring what is needed`)
}

import { homedir } from 'node:os'
import { join } from 'node:path'

/** Where a program keeps its things: the system's directories for root, the XDG base directories otherwise. */
export function defaultPaths(program: 'server' | 'agent', environment: NodeJS.ProcessEnv = process.env) {
  if (process.getuid?.() === 0) {
    return {
      config: `/etc/rackswarm/${program}.yaml`,
      data: `/var/lib/rackswarm/${program}`,
      runtime: '/run/rackswarm',
    }
  }
  const home = environment['HOME'] ?? homedir()
  const base = (name: string, fallback: string) => environment[name] || join(home, fallback)
  return {
    config: join(base('XDG_CONFIG_HOME', '.config'), 'rackswarm', `${program}.yaml`),
    data: join(base('XDG_STATE_HOME', '.local/state'), 'rackswarm', program),
    runtime: join(base('XDG_RUNTIME_DIR', '.local/state'), 'rackswarm'),
  }
}

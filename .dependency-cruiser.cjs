// The arrows of docs/architecture.md: imports point downward only.
const shelf = (name, from, to) => ({
  name,
  severity: 'error',
  from: { path: from },
  to: { path: to },
})

/** @type {import('dependency-cruiser').IConfiguration} */
module.exports = {
  forbidden: [
    {
      name: 'no-cycles',
      severity: 'error',
      from: {},
      to: { circular: true, dependencyTypesNot: ['type-only'] },
    },
    { name: 'no-unresolvable', severity: 'error', from: {}, to: { couldNotResolve: true } },
    {
      name: 'no-orphans',
      severity: 'error',
      from: {
        orphan: true,
        path: '^(lib|server|agent|cli)/',
        pathNot: '(main|worker|quickstart|\\.d)\\.ts$',
      },
      to: {},
    },
    shelf('lib-imports-no-program', '^lib/', '^(server|agent|cli|simulator|test|bench)/'),
    shelf(
      'protocol-is-pure',
      '^lib/protocol/',
      '^(lib/(token|client|runtime)/|node_modules/(?!netmask/)|(node:)?(http|https|fs|dgram|tls|worker_threads)(/|$))',
    ),
    shelf('runtime-is-the-floor', '^lib/runtime/', '^lib/(token|client|protocol)/'),
    shelf('token-does-not-call-out', '^lib/token/', '^lib/client/'),
    shelf('client-does-not-mint', '^lib/client/', '^lib/token/'),
    shelf('server-agent-cli-are-separate (server)', '^server/', '^(agent|cli)/'),
    shelf('server-agent-cli-are-separate (agent)', '^agent/', '^(server|cli)/'),
    shelf('server-agent-cli-are-separate (cli)', '^cli/', '^(server|agent)/'),
    shelf('programs-do-not-know-the-simulator', '^(lib|server|agent)/', '^simulator/'),
    shelf('simulator-is-below-the-cli', '^simulator/', '^cli/'),
    shelf('tracker-does-not-know-the-registry', '^server/tracker/', '^server/registry/'),
    shelf('registry-does-not-know-the-tracker', '^server/registry/', '^server/tracker/'),
    shelf(
      'rooms-do-not-know-the-root (tracker)',
      '^server/(tracker|registry|state|redis)/',
      '^server/[^/]+\\.ts$',
    ),
    shelf(
      'programs-do-not-import-tests',
      '^(lib|server|agent|cli|simulator|bin|packaging)/',
      '^(test|bench)/',
    ),
    {
      name: 'jose-lives-in-lib-token',
      severity: 'error',
      from: { pathNot: '^(lib/token|test)/' },
      to: { path: 'node_modules/jose/' },
    },
    {
      name: 'webtorrent-lives-in-one-file',
      severity: 'error',
      from: { pathNot: '^(agent/engine/webtorrent/webtorrent\\.ts|test/)' },
      to: { path: 'node_modules/webtorrent/' },
    },
    {
      name: 'its-wires-are-guarded-in-one-file',
      severity: 'error',
      from: { pathNot: '^agent/engine/webtorrent/wire-guard\\.ts' },
      to: { path: 'node_modules/bittorrent-protocol/' },
    },
    {
      name: 'netmask-is-for-configuration',
      severity: 'error',
      from: { pathNot: '^(lib/protocol/cidr\\.ts|test/)' },
      to: { path: 'node_modules/netmask/' },
    },
  ],
  options: {
    tsConfig: { fileName: 'tsconfig.json' },
    tsPreCompilationDeps: true,
    doNotFollow: { path: 'node_modules' },
    exclude: { path: '^(dist|packaging/stubs)/' },
    enhancedResolveOptions: { conditionNames: ['import', 'node', 'default'], exportsFields: ['exports'] },
  },
}

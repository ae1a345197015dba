import type { TrackerAction } from './tracker.ts'

/** `undefined` where the path is not a route. Lone paths come before patterns, and those in their order. */
export type MatchRoute = (path: string) => TrackerAction | undefined

export interface TrackerRoutes {
  /** `/announce`, or with chihaya's patterns: `/:key/announce`, `/tracker/*rest`. */
  readonly announce: readonly string[]
  readonly scrape: readonly string[]
}

/**
 * Compiles routes. `:name` stands for one path segment that is not empty, `*name` at the end for all that follows a slash. Paths are
 * compared as sent, not decoded.
 *
 * @throws Error naming the route that cannot be read, or that is there twice
 */
export function compileRoutes({ announce, scrape }: TrackerRoutes): MatchRoute {
  const exact = new Map<string, TrackerAction>()
  const patterns: { readonly pattern: RegExp; readonly action: TrackerAction }[] = []
  const known = new Set<string>()
  const routes = [
    ...announce.map((route) => ({ route, action: 'announce' as const })),
    ...scrape.map((route) => ({ route, action: 'scrape' as const })),
  ]
  for (const { route, action } of routes) {
    const pattern = compileRoute(route)
    const identity = pattern?.source ?? route
    if (known.has(identity)) throw new Error(`Cannot use route ${route}: another route takes the same paths`)
    known.add(identity)
    if (pattern) patterns.push({ pattern, action })
    else exact.set(route, action)
  }
  return (path) => exact.get(path) ?? patterns.find(({ pattern }) => pattern.test(path))?.action
}

/** A pattern, or undefined for a route that stands for itself alone. */
function compileRoute(route: string): RegExp | undefined {
  const wrong = (what: string) => new Error(`Cannot use route ${JSON.stringify(route)}: ${what}`)
  if (!/^\/[!-~]*$/.test(route) || /[?#]/.test(route))
    throw wrong('need a path such as /announce, without ? and #')
  const segments = route.slice(1).split('/')
  const parts = segments.map((segment, i) => {
    const [, literal = '', mark, name = ''] = /^([^:*]*)(?:([:*])(.*))?$/.exec(segment) ?? []
    if (mark === undefined) return `/${RegExp.escape(literal)}`
    if (!/^\w+$/.test(name)) throw wrong(`need one name after ${mark}`)
    if (mark === ':') return `/${RegExp.escape(literal)}[^/]+`
    if (literal !== '' || i !== segments.length - 1) throw wrong('* must be the last segment')
    return '/.*'
  })
  return /[:*]/.test(route) ? new RegExp(`^${parts.join('')}$`) : undefined
}

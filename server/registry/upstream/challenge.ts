/** One challenge of a `WWW-Authenticate` header (RFC 9110 section 11.6.1). Scheme and names are in lower case. */
export interface Challenge {
  readonly scheme: string
  readonly parameters: ReadonlyMap<string, string>
}

const headerMax = 8192

/** Reads the challenges of a header; what cannot be read is passed over. */
export function parseChallenges(header: string): Challenge[] {
  const challenges: { scheme: string; parameters: Map<string, string> }[] = []
  // A parameter, else a word: a scheme, or a token68 that nobody here needs.
  const part = /[\s,]*(?:([\w!#$%&'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"=]+))|([^\s,]+))/gy
  for (const [, name, quoted, bare, word] of header.slice(0, headerMax).matchAll(part)) {
    if (word !== undefined) challenges.push({ scheme: word.toLowerCase(), parameters: new Map() })
    else if (name !== undefined)
      challenges.at(-1)?.parameters.set(name.toLowerCase(), quoted?.replace(/\\(.)/g, '$1') ?? bare ?? '')
  }
  return challenges
}

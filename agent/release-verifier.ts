import type { RegistryClient } from '../lib/client/registry-client.ts'
import { attachedBundles } from '../lib/client/signatures.ts'
import { covers } from '../lib/protocol/reference.ts'
import type { ReleaseIdentity } from '../lib/protocol/statement.ts'
import { ConfigError } from '../lib/runtime/config.ts'
import type { Logger } from '../lib/runtime/log.ts'
import type { ReleaseKey } from '../lib/token/release-keys.ts'
import { readReleaseKeys, releaseKeysMax } from '../lib/token/release-keys.ts'
import type { SignatureFault, Verdict } from '../lib/token/release-signature.ts'
import { verifyRelease } from '../lib/token/release-signature.ts'
import type { AgentConfig } from './config.ts'
import { keyOf } from './releases.ts'

/** A release that this host does not take. The message says why, the hint what to do. */
export class UnverifiedError extends Error {
  override readonly name = 'UnverifiedError'
  readonly fault: SignatureFault
  readonly hint: string

  constructor(fault: SignatureFault, message: string, hint: string) {
    super(message)
    this.fault = fault
    this.hint = hint
  }
}

/** How a release was found, for metrics: a fault only where it was refused or let pass with a warning. */
export interface VerificationObserver {
  signatureChecked(outcome: 'signed' | 'warned' | 'refused', fault: SignatureFault | 'none'): void
}

/** Decides which releases this host takes, by who has signed them. */
export interface ReleaseVerifier {
  /**
   * @returns what is to be said of a release that is taken all the same
   * @throws UnverifiedError where it is refused; RequestError or UnreachableError where the signatures cannot be had
   */
  readonly verify: (release: ReleaseIdentity, signal: AbortSignal) => Promise<string | undefined>
  /** Puts other rules in force, and reads the keys again. @throws ConfigError, and then the old ones stay */
  reload(rules: AgentConfig['signatures']): void
}

type Policy = AgentConfig['signatures']['policy']

interface Rule {
  /** None: every repository. */
  readonly match: readonly string[] | undefined
  readonly policy: Policy
  readonly keys: readonly ReleaseKey[]
  readonly anyTag: boolean
}

export function createReleaseVerifier(
  config: AgentConfig['signatures'],
  deps: {
    registry: Pick<RegistryClient, 'findSignature' | 'referrers' | 'pullManifest' | 'pullBlob'>
    log: Logger
    observe: VerificationObserver
  },
): ReleaseVerifier {
  const { registry, log, observe } = deps
  let rules = readRules(config, log)
  return {
    verify: async (release, signal) => {
      const { repository, digest } = release
      const reference = keyOf(release)
      const { policy, keys, anyTag } = ruleFor(rules, repository)
      if (policy === 'accept_unsigned') return undefined
      // Without keys nothing that is attached could be right.
      const verdict: Verdict =
        keys.length === 0
          ? { kind: 'unverified', fault: 'unknown_key', reason: 'this host trusts no key for it' }
          : await verifyRelease(
              release,
              attachedBundles(
                registry,
                { repository, digest, tag: anyTag ? undefined : release.tag, keys },
                signal,
              ),
              { keys, anyTag },
            )
      if (verdict.kind === 'signed') {
        observe.signatureChecked('signed', 'none')
        log.info({ reference, digest, keyId: verdict.keyId }, 'signature is good')
        return undefined
      }
      const { fault, reason } = verdict
      if (policy === 'warn') {
        observe.signatureChecked('warned', fault)
        log.warn({ reference, digest, fault, reason }, 'release is taken without a good signature')
        return `taken without a good signature: ${reason}`
      }
      observe.signatureChecked('refused', fault)
      throw new UnverifiedError(
        fault,
        `refused: ${reason}`,
        keys.length === 0 ? noKeysHint : hintFor(fault, reference),
      )
    },
    reload: (next) => {
      rules = readRules(next, log)
    },
  }
}

const noKeysHint =
  'Name the public keys of who publishes under signatures.keys in agent.yaml, then SIGHUP; signatures.policy: accept_unsigned takes everything.'

function hintFor(fault: SignatureFault, reference: string): string {
  switch (fault) {
    case 'unsigned':
    case 'unreadable':
    case 'other_tag':
    case 'other_release':
      return `Sign it for what it is: deployctl sign ${reference}`
    case 'unknown_key':
      return `Add the public key to signatures.keys in agent.yaml and send SIGHUP, or sign it with a key that is there: deployctl sign ${reference}`
    case 'too_many':
      return `Sign it for what it is: deployctl sign ${reference}; the audit log says who attached the others`
    case 'bad_signature':
      return `Find out who changed it, then publish the build again or sign it anew: deployctl sign ${reference}`
  }
}

/** The first rule that names the repository; the last one names all. */
function ruleFor(rules: readonly Rule[], repository: string): Rule {
  const rule = rules.find(({ match }) => match?.some((pattern) => covers(pattern, repository)) ?? true)
  if (!rule) throw new Error('there is always a rule for every repository')
  return rule
}

/** @throws ConfigError naming every file that cannot be used */
function readRules({ repositories, ...usual }: AgentConfig['signatures'], log: Logger): Rule[] {
  const faults: string[] = []
  const read = (files: readonly string[], path: string): ReleaseKey[] => {
    const keys = files.flatMap((file) => {
      try {
        return readReleaseKeys(file)
      } catch (error) {
        faults.push(`${path}: ${(error as Error).message}`)
        return []
      }
    })
    if (keys.length > releaseKeysMax)
      faults.push(`${path}: ${keys.length} keys, at most ${releaseKeysMax} are taken`)
    return keys
  }
  const all: Rule = {
    match: undefined,
    policy: usual.policy,
    keys: read(usual.keys, 'signatures.keys'),
    anyTag: usual.accept_other_tags,
  }
  const rules = repositories.map(({ match, policy, keys, accept_other_tags }, i): Rule => ({
    match,
    policy: policy ?? all.policy,
    keys: keys === undefined ? all.keys : read(keys, `signatures.repositories.${i}.keys`),
    anyTag: accept_other_tags ?? all.anyTag,
  }))
  if (faults.length > 0) throw new ConfigError(faults)
  for (const { match, policy, keys } of [...rules, all])
    if (policy === 'require' && keys.length === 0)
      log.warn(
        { repositories: match ?? ['*'], hint: noKeysHint },
        'no release of these repositories will be taken: signatures are required, and no key is trusted',
      )
  return [...rules, all]
}

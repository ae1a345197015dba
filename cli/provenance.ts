import type { Provenance } from '../lib/protocol/statement.ts'

/** What is done: who publishes has built it, or stands for who has; who signs vouches for what is there already. */
export type SignedAct = 'publish' | 'sign'

/** What these mean is in docs/signatures.md. */
const buildTypes = { publish: 'urn:rackswarm:publish:v1', sign: 'urn:rackswarm:sign:v1' } as const
/** No service that anyone could ask what it did. */
const somewhere = 'urn:rackswarm:builder:unknown'
/** A variable that is longer is no name of anything. */
const valueMax = 1000

/**
 * Where a release comes from, by the variables that GitHub Actions and GitLab CI set; outside of them only what was done. Nothing else of the
 * environment is looked at: it is full of secrets.
 */
export function readProvenance(act: SignedAct, env: NodeJS.ProcessEnv): Provenance {
  const read: Read = (name) => {
    const value = env[name]
    return value === undefined || value === '' || value.length > valueMax ? undefined : value
  }
  const buildType = buildTypes[act]
  if (read('GITHUB_ACTIONS') === 'true') return fromGitHub(act, buildType, read)
  if (read('GITLAB_CI') === 'true') return fromGitLab(act, buildType, read)
  return { buildType, builderId: somewhere }
}

type Read = (name: string) => string | undefined

function fromGitHub(act: SignedAct, buildType: string, read: Read): Provenance {
  const server = read('GITHUB_SERVER_URL') ?? 'https://github.com'
  const repository = read('GITHUB_REPOSITORY')
  const run = read('GITHUB_RUN_ID')
  return {
    buildType,
    builderId: `${server}/actions/runner/${read('RUNNER_ENVIRONMENT') ?? 'self-hosted'}`,
    ...(repository !== undefined &&
      run !== undefined && {
        invocationId: `${server}/${repository}/actions/runs/${run}/attempts/${read('GITHUB_RUN_ATTEMPT') ?? '1'}`,
      }),
    ...parameters(read, {
      event: 'GITHUB_EVENT_NAME',
      ref: 'GITHUB_REF',
      workflow: 'GITHUB_WORKFLOW_REF',
      repository_id: 'GITHUB_REPOSITORY_ID',
      repository_owner_id: 'GITHUB_REPOSITORY_OWNER_ID',
    }),
    ...source(act, repository && `${server}/${repository}`, read('GITHUB_REF'), read('GITHUB_SHA')),
  }
}

function fromGitLab(act: SignedAct, buildType: string, read: Read): Provenance {
  const project = read('CI_PROJECT_URL')
  const job = read('CI_JOB_URL')
  const ref = read('CI_COMMIT_TAG')
  const branch = read('CI_COMMIT_BRANCH')
  return {
    buildType,
    builderId: `${project ?? read('CI_SERVER_URL') ?? 'urn:gitlab'}/-/runners/${read('CI_RUNNER_ID') ?? 'unknown'}`,
    ...(job !== undefined && { invocationId: job }),
    ...parameters(read, {
      event: 'CI_PIPELINE_SOURCE',
      ref: 'CI_COMMIT_REF_NAME',
      workflow: 'CI_CONFIG_PATH',
      job: 'CI_JOB_NAME',
      project_id: 'CI_PROJECT_ID',
      pipeline_id: 'CI_PIPELINE_ID',
    }),
    ...source(
      act,
      project,
      ref === undefined ? branch && `refs/heads/${branch}` : `refs/tags/${ref}`,
      read('CI_COMMIT_SHA'),
    ),
  }
}

function parameters(
  read: Read,
  names: Readonly<Record<string, string>>,
): Pick<Provenance, 'internalParameters'> {
  const found = Object.entries(names).flatMap(([key, name]) => {
    const value = read(name)
    return value === undefined ? [] : [[key, value] as const]
  })
  return found.length === 0 ? {} : { internalParameters: Object.fromEntries(found) }
}

/** What a release was built of. A job that only signs has not built it. */
function source(
  act: SignedAct,
  url: string | undefined,
  ref: string | undefined,
  commit: string | undefined,
): Pick<Provenance, 'resolvedDependencies'> {
  if (act === 'sign' || url === undefined) return {}
  return {
    resolvedDependencies: [
      {
        uri: `git+${url}${ref === undefined ? '' : `@${ref}`}`,
        ...(commit !== undefined && { digest: { gitCommit: commit } }),
      },
    ],
  }
}

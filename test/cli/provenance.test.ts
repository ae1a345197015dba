import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { readProvenance } from '../../cli/provenance.ts'

const github = {
  GITHUB_ACTIONS: 'true',
  GITHUB_SERVER_URL: 'https://github.com',
  GITHUB_REPOSITORY: 'acme/web',
  GITHUB_REPOSITORY_ID: '42',
  GITHUB_REPOSITORY_OWNER_ID: '7',
  GITHUB_SHA: 'a'.repeat(40),
  GITHUB_REF: 'refs/heads/main',
  GITHUB_RUN_ID: '99',
  GITHUB_RUN_ATTEMPT: '2',
  GITHUB_WORKFLOW_REF: 'acme/web/.github/workflows/release.yaml@refs/heads/main',
  GITHUB_EVENT_NAME: 'push',
  GITHUB_TOKEN: 'a-secret',
  RUNNER_ENVIRONMENT: 'github-hosted',
}

test('in GitHub Actions a release comes from a repository, a commit, a run and a runner', () => {
  assert.deepEqual(readProvenance('publish', github), {
    buildType: 'urn:rackswarm:publish:v1',
    builderId: 'https://github.com/actions/runner/github-hosted',
    invocationId: 'https://github.com/acme/web/actions/runs/99/attempts/2',
    internalParameters: {
      event: 'push',
      ref: 'refs/heads/main',
      workflow: 'acme/web/.github/workflows/release.yaml@refs/heads/main',
      repository_id: '42',
      repository_owner_id: '7',
    },
    resolvedDependencies: [
      { uri: 'git+https://github.com/acme/web@refs/heads/main', digest: { gitCommit: 'a'.repeat(40) } },
    ],
  })
})

test('in GitLab CI too', () => {
  const gitlab = {
    GITLAB_CI: 'true',
    CI_SERVER_URL: 'https://gitlab.example',
    CI_PROJECT_URL: 'https://gitlab.example/acme/web',
    CI_PROJECT_ID: '5',
    CI_COMMIT_SHA: 'b'.repeat(40),
    CI_COMMIT_REF_NAME: 'v1',
    CI_COMMIT_TAG: 'v1',
    CI_JOB_URL: 'https://gitlab.example/acme/web/-/jobs/11',
    CI_JOB_TOKEN: 'a-secret',
    CI_RUNNER_ID: '3',
    CI_PIPELINE_ID: '12',
    CI_PIPELINE_SOURCE: 'push',
  }
  assert.deepEqual(readProvenance('publish', gitlab), {
    buildType: 'urn:rackswarm:publish:v1',
    builderId: 'https://gitlab.example/acme/web/-/runners/3',
    invocationId: 'https://gitlab.example/acme/web/-/jobs/11',
    internalParameters: { event: 'push', ref: 'v1', project_id: '5', pipeline_id: '12' },
    resolvedDependencies: [
      { uri: 'git+https://gitlab.example/acme/web@refs/tags/v1', digest: { gitCommit: 'b'.repeat(40) } },
    ],
  })
})

test('elsewhere it says only what was done; and who only signs has built nothing', () => {
  assert.deepEqual(readProvenance('publish', { HOME: '/root' }), {
    buildType: 'urn:rackswarm:publish:v1',
    builderId: 'urn:rackswarm:builder:unknown',
  })
  const signed = readProvenance('sign', github)
  assert.equal(signed.buildType, 'urn:rackswarm:sign:v1')
  assert.equal(signed.resolvedDependencies, undefined)
  assert.match(signed.invocationId ?? '', /runs\/99/)
})

test('whatever the environment holds, secrets and long texts stay out of it', () => {
  const values = fc.option(fc.oneof(fc.string(), fc.constant('x'.repeat(5000))), { nil: undefined })
  const environment = fc.record(Object.fromEntries(Object.keys(github).map((name) => [name, values])))
  fc.assert(
    fc.property(environment, fc.constantFrom('GITHUB_ACTIONS', 'GITLAB_CI', 'NEITHER'), (env, where) => {
      const said = JSON.stringify(
        readProvenance('publish', { ...env, GITHUB_TOKEN: 'the-secret', [where]: 'true' }),
      )
      assert.ok(!said.includes('the-secret'))
      assert.ok(!said.includes('x'.repeat(2000)))
    }),
  )
})

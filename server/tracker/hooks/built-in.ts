import type { z } from 'zod'
import type { PreHookDefinition } from '../hooks.ts'
import { clientApproval } from './client-approval.ts'
import { intervalVariation } from './interval-variation.ts'
import { networkApproval } from './network-approval.ts'
import { rateLimit } from './rate-limit.ts'
import { torrentApproval } from './torrent-approval.ts'

/** The hooks that ship with the tracker and need nothing but their options. `token` is made by the server, which has the keys. */
export const builtInPreHooks = [
  clientApproval,
  torrentApproval,
  networkApproval,
  intervalVariation,
  rateLimit,
] as const satisfies readonly PreHookDefinition<z.ZodType>[]

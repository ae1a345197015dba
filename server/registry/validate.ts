import type { z } from 'zod'
import { ApiError } from './api-error.ts'

/** Reads a request body. @throws ApiError 400 naming each field that is wrong */
export function validate<Schema extends z.ZodType>(schema: Schema, body: unknown): z.output<Schema> {
  const parsed = schema.safeParse(body ?? {})
  if (parsed.success) return parsed.data
  const faults = parsed.error.issues.map(
    ({ path, message }) => `${path.length === 0 ? 'body' : path.join('.')}: ${message}`,
  )
  throw new ApiError(400, 'BAD_REQUEST', `Cannot use the request: ${faults.join('; ')}`)
}

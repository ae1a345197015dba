-- Says that a server is there, and who else is.
-- KEYS[1] the servers: a sorted set by when each is taken to be gone
local servers = KEYS[1]
-- ARGV: name of the server; milliseconds that it is there for, 0 when it leaves
local name, lifetimeMs = ARGV[1], tonumber(ARGV[2])

local time = redis.call('TIME')
local nowMs = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', servers, '-inf', nowMs)
if lifetimeMs == 0 then
  redis.call('ZREM', servers, name)
else
  redis.call('ZADD', servers, nowMs + lifetimeMs, name)
  redis.call('PEXPIRE', servers, lifetimeMs * 2)
end
return redis.call('ZRANGE', servers, 0, -1)

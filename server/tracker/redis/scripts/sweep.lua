-- Counts one swarm, after whoever is due has left it.
--
-- KEYS[1] swarm   its hash
-- KEYS[2] due     its peers by the second at which they may be due
-- ARGV[1] now     milliseconds, 0 for those of Redis
--
-- Returns what the root has: seeders and leechers of IPv4 and of IPv6, and after 8 bytes more downloaded, 4 bytes each; nil where there
-- is no such swarm.

local key, field = KEYS[1], 'n' .. root
local value = redis.call('HGET', key, field)
if not value then return nil end
local now = floor(readClock(tonumber(ARGV[1])) / 1000)
local downloaded, nextDue, expiresAt = readHeader(value)
if nextDue <= now then
  -- After a command that only removes, Redis lets a script write though its memory is used up.
  redis.call('HDEL', key, '')
  local swarm = openSwarm(key, KEYS[2], { [field] = value })
  nextDue = swarm.expire(now)
  swarm.setHeader(downloaded, nextDue, expiresAt)
  swarm.flush()
  value = swarm.get(field)
end
return value

-- Reads entries in the order of their keys: key, "VERSION JSON", key, ...
-- `from` and `to` are bounds as ZRANGEBYLEX takes them.
local from, to, limit = ARGV[2], ARGV[3], ARGV[4]

local entries = {}
for i, key in ipairs(redis.call('ZRANGEBYLEX', index, from, to, 'LIMIT', 0, limit)) do
  entries[2 * i - 1] = key
  entries[2 * i] = redis.call('HGET', values, key)
end
return entries

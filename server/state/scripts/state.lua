-- A state, and how its changes are logged. Other scripts begin with this text; it is no script of its own.
--
-- KEYS[1] generation  what this state is called: otherwise once Redis has lost it
-- KEYS[2] values      a hash: key, "VERSION JSON"
-- KEYS[3] index       the keys, sorted
-- KEYS[4] log         the last changes, numbered in order: a nonce, which tells a change from another one with its number; the key; and
--                     unless it was deleted, "VERSION JSON"
-- ARGV[1] expected    the generation that was read before; empty while there is none yet
local generation, values, index, log = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

if (redis.call('GET', generation) or '') ~= ARGV[1] then
  return redis.error_reply('GENERATION This is not the state that was read before')
end

-- Changes that a server may have missed and still be told of one by one; about 600 bytes each.
local logMax = 10000

-- Of "VERSION JSON", or of the id of a change.
local function numberOf(text)
  return tonumber(string.match(text, '^%d+'))
end

local function versionOf(key)
  local value = redis.call('HGET', values, key)
  return value and numberOf(value) or 0
end

local function lastNumber()
  local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  return last and numberOf(last[1]) or 0
end

-- Writes an entry, and notes that as a change. `value` is "VERSION JSON".
local function write(number, nonce, key, value)
  redis.call('HSET', values, key, value)
  redis.call('ZADD', index, 0, key)
  redis.call('XADD', log, 'MAXLEN', '~', logMax, string.format('%.0f-0', number),
    'nonce', nonce, 'key', key, 'value', value)
end

-- Removes an entry, and notes that as a change.
local function remove(number, nonce, key)
  redis.call('HDEL', values, key)
  redis.call('ZREM', index, key)
  redis.call('XADD', log, 'MAXLEN', '~', logMax, string.format('%.0f-0', number), 'nonce', nonce, 'key', key)
end

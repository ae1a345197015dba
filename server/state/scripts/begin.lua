-- Gives a state that has no generation one, and notes up to which change of the one that was lost it was put back. Returns the
-- generation that counts.
local generation, restored, refill = KEYS[1], KEYS[2], KEYS[3]
-- `lost` is the generation before, empty for the first one; `number` that of the last change in the copy that was put back.
local proposed, lost, number = ARGV[1], ARGV[2], ARGV[3]

local found = redis.call('GET', generation)
if not found then
  local claimed = lost == '' and redis.call('HLEN', refill) == 0 or redis.call('HGET', refill, lost) == number
  if not claimed then
    return redis.error_reply('GENERATION Another server puts the state back')
  end
  redis.call('SET', generation, proposed)
  redis.call('DEL', refill)
end
if lost ~= '' and tonumber(number) > tonumber(redis.call('HGET', restored, lost) or '-1') then
  redis.call('HSET', restored, lost, number)
end
return found or proposed

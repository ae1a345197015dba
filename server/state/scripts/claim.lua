-- Asks to put back a state that has no generation. Of copies of one lost generation the one that ends last has seen all that the others
-- have, and knows what was deleted since: the others leave it to that one. Returns nothing where the caller may begin, else how far it is.
local refill = KEYS[5]
-- `lost` is empty for a server without a copy. With `insists` whoever was at it is not waited for any more.
local lost, number, insists = ARGV[2], ARGV[3], ARGV[4]

local others = redis.call('HLEN', refill)
local furthest = tonumber(redis.call('HGET', refill, lost) or '-1')
if insists == '' and (lost == '' and others > 0 or furthest > tonumber(number)) then
  return redis.call('HLEN', values) .. ' of ' .. table.concat(redis.call('HVALS', refill), ' ')
end
if lost == '' then
  redis.call('DEL', refill)
  return false
end
-- What one that ends earlier has put back may have been deleted since.
if others == 1 and furthest >= 0 and furthest < tonumber(number) then
  redis.call('UNLINK', values, index, log)
end
redis.call('HSET', refill, lost, number)
return false

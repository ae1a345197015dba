-- Takes a swarm out of the list of swarms, unless it has been listed anew since it was looked at.
--
-- KEYS[1] swarms    a part of the list
-- ARGV[1] infohash
-- ARGV[2] score     with which it was seen there

if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1])) == tonumber(ARGV[2]) then
  return redis.call('ZREM', KEYS[1], ARGV[1])
end
return 0

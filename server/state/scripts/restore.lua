-- Puts back entries that are missing, or that are older here. Returns how many.
local refill = KEYS[5]
-- While there is no generation yet `lost` and `changes` are what was claimed. Then key, "VERSION JSON", key, ...
local lost, changes, nonce, channel = ARGV[2], ARGV[3], ARGV[4], ARGV[5]

if ARGV[1] == '' and redis.call('HGET', refill, lost) ~= changes then
  return redis.error_reply('GENERATION Another server puts the state back')
end
local number = lastNumber()
local restored = 0
for i = 6, #ARGV, 2 do
  local key, kept = ARGV[i], ARGV[i + 1]
  if versionOf(key) < numberOf(kept) then
    restored = restored + 1
    write(number + restored, nonce, key, kept)
  end
end
if restored > 0 then
  redis.call('PUBLISH', channel, '')
end
return restored

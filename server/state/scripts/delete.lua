-- Deletes one entry, if it is at the version that was expected. Returns whether there was one, or nothing.
-- `ifVersion` may be empty.
local key, ifVersion, nonce, channel = ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local version = versionOf(key)
if ifVersion ~= '' and tonumber(ifVersion) ~= version then
  return false
end
if version == 0 then
  return 0
end
remove(lastNumber() + 1, nonce, key)
redis.call('PUBLISH', channel, key)
return 1

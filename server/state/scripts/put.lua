-- Writes one entry, if it is at the version that was expected. Returns the new version, or nothing.
-- `ifVersion` may be empty.
local key, json, ifVersion, nonce, channel = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local version = versionOf(key)
if ifVersion ~= '' and tonumber(ifVersion) ~= version then
  return false
end
local written = string.format('%.0f', version + 1)
write(lastNumber() + 1, nonce, key, written .. ' ' .. json)
redis.call('PUBLISH', channel, key)
return written

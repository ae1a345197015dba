-- One announce: records it, and answers with counts and with stretches of lists, of which the announcer may be told.
--
-- KEYS[1] swarm     its hash
-- KEYS[2] due       its peers by the second at which they may be due
-- KEYS[3] gone      peers that have stopped lately, by the second at which they did
-- ARGV[1] peer      the announcer's endpoint, 6 or 18 bytes
-- ARGV[2] request   mode, whether it says that it completed, levels: a byte each; rank, life (milliseconds): 4 each; now (milliseconds, 0
--                   for those of Redis): 6; how long ago it was made (milliseconds): 4; the millisecond of Redis after which it is too
--                   late, or 0: 6; kind: 1, and place: 4; peer_id: 20. Then the fields of the place and of the nodes above it,
--                   5 each
-- ARGV[3] stretches for each the field of a block, 9 bytes, and from and to which of its bytes, 2 each
--
-- Modes: 0 records; 1 takes the peer out; 2 records where the peer is known, though Redis is out of memory.
--
-- What was made a while ago changes nothing where the peer has been heard of since. What is too late changes nothing at all: whoever sent
-- it has been told that it failed, and tells again what is still so.
--
-- Returns one string, since each one of a list has its price on the way: flags (1 the peer is stored, 2 the swarm was empty, 4 it was too
-- late), a byte; the milliseconds of Redis, 6; then with its length before it, 2 bytes, each of what the fields of the place and of the nodes
-- above it have, and of the stretches, as far as the lists go. All as they are after the announce.

local modeStop, modeKnown, modeLook = 1, 2, 3
-- For whoever tells late of a peer that has stopped elsewhere meanwhile: so many, for so long.
local goneMax, goneSeconds = 1000, 7200
local key, peer, request, stretches = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local mode, completed, levels, rank, life, given, age, notAfter, kindAndPlace, peerId, pathAt =
  unpackStruct('<BBBI4I4I6I4I6c5c20', request)

local fields, last = { peer }, 1 + levels
for level = 1, levels do
  fields[1 + level] = sub(request, pathAt, pathAt + 4)
  pathAt = pathAt + 5
end
local count = last
for at = 1, #stretches, 13 do
  count = count + 1
  fields[count] = sub(stretches, at, at + 8)
end
local values = redis.call('HMGET', key, unpack(fields))
local record = values[1]
local swarm
local function open()
  if swarm then return end
  local cache = {}
  for at = 1, count do cache[fields[at]] = values[at] end
  swarm = openSwarm(key, KEYS[2], cache)
end

local nowMs = readClock(given)
local now = floor(nowMs / 1000)
local downloaded, nextDue, expiresAt = readHeader(values[last])
local wasDownloaded, wasNextDue = downloaded, nextDue
local isNew = false
local isTooLate = notAfter > 0 and nowMs > notAfter
local madeAt = floor((nowMs - age) / 1000)
-- After a command that only removes, Redis lets a script write though its memory is used up: who is known may stay, and may go.
if mode ~= 0 then redis.call('HDEL', key, '') end
if nextDue <= now then
  open()
  nextDue = swarm.expire(now)
  record = swarm.get(peer)
end

local isOutdated = isTooLate
if age > 0 and not isTooLate then
  local heardAt = record and unpackStruct('<I4', record, #record - 23) or redis.call('ZSCORE', KEYS[3], peer)
  isOutdated = heardAt and tonumber(heardAt) > madeAt
end

local expires
if isOutdated then
  mode = modeLook
elseif mode == modeStop then
  redis.call('ZADD', KEYS[3], madeAt, peer)
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -goneMax - 1)
  redis.call('EXPIRE', KEYS[3], goneSeconds)
  if record then
    open()
    swarm.leave(peer, record)
    swarm.forget(peer)
    record = false
  end
elseif record or mode ~= modeKnown then
  local due = math.ceil((nowMs + life) / 1000)
  local stands = record and unpackStruct('<I4', record, 5) or never
  local earlier = due < stands and due or stands
  if record and sub(record, 9, 13) == kindAndPlace then
    record = pack('<I4I4', due, earlier) .. sub(record, 9, -25) .. pack('<I4', madeAt) .. peerId
  else
    open()
    local kind = byte(kindAndPlace, 1)
    if record then
      if kind == 0 and byte(record, 9) == 1 then downloaded = downloaded + 1 end
      swarm.leave(peer, record)
    else
      isNew = swarm.isEmpty()
      if kind == 0 and completed == 1 then downloaded = downloaded + 1 end
    end
    local path = {}
    for level = 1, levels do path[level] = sub(fields[1 + level], 2) end
    local indexes = swarm.enter(peer, kind, table.concat(path), rank)
    record = pack('<I4I4', due, earlier) .. kindAndPlace .. indexes .. pack('<I4', madeAt) .. peerId
  end
  if due < nextDue then nextDue = due end
  if isNew or due + keptSeconds > expiresAt then
    expires = due + 2 * keptSeconds
    expiresAt = expires
  end
  if expires or due < stands then
    open()
    swarm.schedule(peer, earlier)
  end
  if swarm then
    swarm.put(peer, record)
  else
    redis.call('HSET', key, peer, record)
  end
end

if swarm then
  if expires or downloaded ~= wasDownloaded or nextDue ~= wasNextDue or mode == modeStop then
    swarm.setHeader(downloaded, nextDue, expiresAt)
  end
  swarm.flush()
  for at = 2, count do values[at] = swarm.get(fields[at]) end
end
if expires then
  redis.call('EXPIRE', key, expires - now)
  redis.call('EXPIRE', KEYS[2], expires - now)
end

local flags = (record and 1 or 0) + (isNew and 2 or 0) + (isTooLate and 4 or 0)
local parts, length, at = {}, 0, 10
for from = 2, count do
  local value = values[from] or ''
  if from > last then
    local first, final = unpackStruct('<I2I2', stretches, at)
    if first > 1 or final < #value then value = sub(value, first, final) end
    at = at + 13
  end
  parts[length + 1], parts[length + 2] = #value, value
  length = length + 2
end
return pack('<BI6' .. string.rep('I2c0', count - 1), flags, nowMs, unpack(parts))

-- Leases a part of a build to a host that may fetch it from a server, as server/registry/webseed-policy.ts does for one server alone.
-- KEYS[1] the parts of the swarm: index to "done until since took host", took -1 where nobody had it yet, and since when they are known; KEYS[2] whether the host may have all
local parts, allKey = KEYS[1], KEYS[2]
-- ARGV: host; pieces of the build; 1 where the swarm has a seeder; milliseconds for which the host has stood still, or -1; the first
-- piece of a part of which it has asked for all, -2 for whichever it holds, or -1; milliseconds of a lease, of a part that was fetched, and
-- until who stands still gets all; parts at most; pieces of a part at least; hosts of the first wave; how many times as long as half of the others
-- a slow host takes, the milliseconds that it takes at least, and parts to know that from; milliseconds of a part that was fetched at least
local host, pieces = ARGV[1], tonumber(ARGV[2])
local isSeeded, stalledMs, rangeDone = ARGV[3] == '1', tonumber(ARGV[4]), tonumber(ARGV[5])
local leaseMs, doneMs, patienceMs = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local partsMax, partPiecesMin, hostsMax = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local slowFactor, slowMinMs, partsTimedMin, doneMinMs = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])

if isSeeded then return stalledMs >= 0 and {0, pieces} end

local time = redis.call('TIME')
local nowMs = time[1] * 1000 + math.floor(time[2] / 1000)
local count = math.max(1, math.min(partsMax, math.floor(pieces / partPiecesMin)))
local function lease(i)
  local first = math.floor(i * pieces / count)
  return {first, math.floor((i + 1) * pieces / count) - first}
end
local keptMs = math.max(leaseMs, doneMs) * 10
local function write(i, done, untilMs, since, took)
  redis.call('HSET', parts, i, string.format('%d %d %d %d %s', done, untilMs, since, took, host))
  redis.call('PEXPIRE', parts, keptMs)
end

local function leasePart(knownForMs)
  local found = redis.call('HGETALL', parts)
  local known, taken, holders, holdersCount, own, isFirst = {}, {}, {}, 0, nil, false
  local since, tookBy, held = {}, {}, {}
  for at = 1, #found, 2 do
    local i = tonumber(found[at])
    local done, untilMs, sinceMs, tookMs, holder = string.match(found[at + 1], '^(%d) (%d+) (%d+) (-?%d+) (.*)$')
    if i and done then
      known[i] = true
      since[i], tookBy[i] = tonumber(sinceMs), tonumber(tookMs)
      taken[i] = tonumber(untilMs) > nowMs
      isFirst = isFirst or holder == host
      if done == '0' and holder == host then own = own and math.min(own, i) or i end
      if done == '0' and taken[i] then
        held[i] = true
        if not holders[holder] then
          holders[holder] = true
          holdersCount = holdersCount + 1
        end
      end
    end
  end
  if own and rangeDone ~= -2 and rangeDone ~= lease(own)[1] then
    write(own, 0, nowMs + leaseMs, since[own], tookBy[own])
    return lease(own)
  end
  if own then
    if tookBy[own] < 0 then tookBy[own] = nowMs - since[own] end
    write(own, 1, nowMs + math.min(doneMs, math.max(doneMinMs, knownForMs)), since[own], tookBy[own])
    if taken[own] then holdersCount = holdersCount - 1 end
    taken[own] = true
    held[own] = nil
  end
  if holdersCount >= hostsMax then return end
  local function slowest()
    local timed, found = {}, nil
    for _, took in pairs(tookBy) do if took >= 0 then timed[#timed + 1] = took end end
    if #timed < partsTimedMin then return end
    table.sort(timed)
    local tooLongMs = math.max(slowMinMs, slowFactor * timed[math.floor(#timed / 2) + 1])
    for i = 0, count - 1 do
      if held[i] and nowMs - since[i] > tooLongMs and (not found or since[i] < since[found]) then found = i end
    end
    return found
  end
  local function first(isFree)
    for i = 0, count - 1 do if isFree(i) then return i end end
  end
  local free = first(function(i) return not known[i] end)
    or (isFirst and slowest())
    or first(function(i) return not taken[i] end)
  if not free then return end
  write(free, 0, nowMs + leaseMs, nowMs, tookBy[free] or -1)
  return lease(free)
end

if redis.call('HSETNX', parts, 'since', nowMs) == 1 then redis.call('PEXPIRE', parts, keptMs) end
local mayHaveAll = redis.call('EXISTS', allKey) == 1
local knownForMs = nowMs - tonumber(redis.call('HGET', parts, 'since'))
local part = not mayHaveAll and leasePart(knownForMs)
if part then return part end
if not mayHaveAll and math.min(stalledMs, knownForMs) < patienceMs then return false end
redis.call('SET', allKey, '1', 'PX', leaseMs)
return {0, pieces}

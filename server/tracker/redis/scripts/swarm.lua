-- One swarm, and how peers enter and leave it. Other scripts begin with this text; it is no script of its own.
--
-- The swarm is one hash. Its fields, told apart by length and first letter (numbers are little-endian):
--   endpoint            6 or 18 bytes: a peer. Second at which it is due, second at which it stands in the sorted set, kind (0 seeder,
--                       1 leecher), place, its index in the list of each node from the place up, second at which it was heard of
--                       last, peer_id
--   'n' node            seeders and leechers of IPv4, then of IPv6; its index among its parent's children, and how many children it has.
--                       Of the root then: downloaded, second before which nobody is due, second at which the keys expire.
--                       Of a place: how many nodes there are from it up to the root, and which; how many ranks of IPv4 and of IPv6
--                       follow, a byte each; the lowest ranks of its leechers of IPv4, sorted, and of IPv6
--   'b' node list block up to 64 entries (16 of a node above places) of a list of that node, all blocks full but the last. Lists 1 to
--                       4: its peers, as the counts stand in 'n'; an entry is an endpoint and the child node below that it belongs to,
--                       or in a place its rank. List 0: its children that have peers.
--
-- So a random peer of any node is a random index, and whoever leaves gives its index to the last one: nothing walks the swarm.

local byte, char, sub, floor = string.byte, string.char, string.sub, math.floor
local pack, unpackStruct = struct.pack, struct.unpack

-- A place is mostly read as a whole, of the others a few peers here and there. Lua reads each byte of each string that it is given.
local placeBlock, nodeBlock = 64, 16
local root = '\0\0\0\0'
-- Ranks kept of a place, and how few bring a look at all others for the next ones: gateways are fewer.
local ranksMax, ranksMin, rankScanMax = 24, 8, 1024
-- Peers that are looked at in one call when they are due.
local dueMax = 500
-- How long at least the keys outlive the last peer, in seconds: for as long its completions are remembered.
local keptSeconds = 86400
local never = 4294967295

local function blockField(list, index, blockSize)
  local block = floor(index / blockSize)
  return list .. char(block % 256, floor(block / 256) % 256, floor(block / 65536))
end

-- Reads and writes through a cache; `flush` sends what has changed. Nothing is written before, so a Redis without memory refuses all or nothing.
local function openSwarm(swarm, dueKey, cache)
  local changed, gone, due = {}, {}, {}

  local function get(field)
    local value = cache[field]
    if value == nil then
      value = redis.call('HGET', swarm, field)
      cache[field] = value
    end
    return value
  end

  local function put(field, value)
    cache[field] = value
    changed[field] = true
  end

  local function append(list, length, entry, blockSize)
    local field = blockField(list, length, blockSize)
    put(field, length % blockSize == 0 and entry or get(field) .. entry)
  end

  -- The last entry takes the place of the one that goes. Returns it, or nil where the last one went.
  local function remove(list, length, index, size, blockSize)
    local field = blockField(list, length - 1, blockSize)
    local last = get(field)
    local moved = sub(last, -size)
    put(field, #last > size and sub(last, 1, -size - 1))
    if index == length - 1 then return nil end
    field = blockField(list, index, blockSize)
    local block, at = get(field), index % blockSize * size
    put(field, sub(block, 1, at) .. moved .. sub(block, at + size + 1))
    return moved
  end

  local function readNode(node)
    local value = get('n' .. node)
    if not value then return { 0, 0, 0, 0, 0, 0, rest = '' } end
    local fields = { unpackStruct('<I4I4I4I4I4I4', value) }
    fields.rest = sub(value, 25)
    return fields
  end

  local function peersIn(fields)
    return fields[1] + fields[2] + fields[3] + fields[4]
  end

  -- The root stays for what it knows of the swarm; `setHeader` ends it.
  local function writeNode(node, fields)
    put(
      'n' .. node,
      (peersIn(fields) > 0 or node == root)
        and pack('<I4I4I4I4I4I4', fields[1], fields[2], fields[3], fields[4], fields[5], fields[6]) .. fields.rest
    )
  end

  -- What only places have: the nodes from it up, and the ranks of IPv4 and IPv6.
  local function readRest(rest)
    local pathEnd = 1 + 4 * byte(rest, 1)
    local ranksAt = pathEnd + 3
    local ranksEnd = ranksAt - 1 + 4 * byte(rest, pathEnd + 1)
    return sub(rest, 2, pathEnd), { sub(rest, ranksAt, ranksEnd), sub(rest, ranksEnd + 1) }
  end

  local function writeRest(path, ranks)
    return char(#path / 4) .. path .. char(#ranks[1] / 4, #ranks[2] / 4) .. ranks[1] .. ranks[2]
  end

  local function readRanks(packed)
    local ranks = { unpackStruct('<' .. string.rep('I4', #packed / 4), packed) }
    ranks[#ranks] = nil
    return ranks
  end

  local function writeRanks(ranks)
    return pack('<' .. string.rep('I4', #ranks), unpack(ranks))
  end

  -- `before`: leechers of the place without the one that comes. What is kept are the lowest ranks of all.
  local function rankIn(packed, rank, before)
    local ranks = readRanks(packed)
    local length = #ranks
    if length < before and rank >= (ranks[length] or 0) then return packed end
    local at = 1
    while at <= length and ranks[at] <= rank do at = at + 1 end
    table.insert(ranks, at, rank)
    ranks[ranksMax + 1] = nil
    return writeRanks(ranks)
  end

  -- `after`: leechers of the place that are left, in `list`.
  local function rankOut(packed, rank, after, list, size)
    local ranks = readRanks(packed)
    local found
    for at = 1, #ranks do
      if ranks[at] == rank then found = at end
    end
    if not found then return packed end
    table.remove(ranks, found)
    if #ranks < ranksMin and #ranks < after then
      ranks = {}
      for first = 0, math.min(after, rankScanMax) - 1, placeBlock do
        local block = get(blockField(list, first, placeBlock))
        for at = size - 3, #block, size do ranks[#ranks + 1] = unpackStruct('<I4', block, at) end
      end
      table.sort(ranks)
      for at = #ranks, ranksMax + 1, -1 do ranks[at] = nil end
    end
    return writeRanks(ranks)
  end

  -- The list of a node in which a peer stands, the index of its count, and of its family's ranks.
  local function listOf(peer, kind)
    local family = #peer == 6 and 1 or 2
    local count = 2 * family - 1 + kind
    return char(count), count, family
  end

  -- `path`: the place and the nodes above it; what the place has counts. Returns the indexes in their lists.
  local function enter(peer, kind, path, rank)
    local nodes = { readNode(sub(path, 1, 4)) }
    local ranks = { '', '' }
    if nodes[1].rest ~= '' then path, ranks = readRest(nodes[1].rest) end
    local list, count, family = listOf(peer, kind)
    if kind == 1 then ranks[family] = rankIn(ranks[family], rank, nodes[1][count]) end
    nodes[1].rest = writeRest(path, ranks)
    local indexes, below, isNew = {}, nil, false
    for level = 1, #path / 4 do
      local node = sub(path, level * 4 - 3, level * 4)
      local fields = nodes[level] or readNode(node)
      nodes[level] = fields
      if isNew then
        nodes[level - 1][5] = fields[6]
        local children = 'b' .. node .. '\0'
        append(children, fields[6], below, nodeBlock)
        fields[6] = fields[6] + 1
      end
      isNew = peersIn(fields) == 0
      append('b' .. node .. list, fields[count], peer .. (below or pack('<I4', rank)), below and nodeBlock or placeBlock)
      indexes[level] = pack('<I4', fields[count])
      fields[count] = fields[count] + 1
      below = node
    end
    for level = 1, #nodes do writeNode(sub(path, level * 4 - 3, level * 4), nodes[level]) end
    return table.concat(indexes)
  end

  local function leave(peer, record)
    local kind, size = byte(record, 9), #peer + 4
    local list, count, family = listOf(peer, kind)
    local fields = readNode(sub(record, 10, 13))
    local path, ranks = readRest(fields.rest)
    local levels = #path / 4
    local emptied
    for level = 1, levels do
      local node = sub(path, level * 4 - 3, level * 4)
      if level > 1 then fields = readNode(node) end
      local index = unpackStruct('<I4', record, 10 + 4 * level)
      local own = 'b' .. node .. list
      local rank
      if level == 1 and kind == 1 then
        rank = unpackStruct('<I4', get(blockField(own, index, placeBlock)), index % placeBlock * size + size - 3)
      end
      local moved = remove(own, fields[count], index, size, level == 1 and placeBlock or nodeBlock)
      fields[count] = fields[count] - 1
      if moved then
        local other = sub(moved, 1, #peer)
        local its = get(other)
        -- Counted from the root: its place may be further below this node, or nearer.
        local at = #its - 23 - 4 * (levels - level + 1)
        put(other, sub(its, 1, at - 1) .. pack('<I4', index) .. sub(its, at + 4))
      end
      if rank then
        ranks[family] = rankOut(ranks[family], rank, fields[count], own, size)
        fields.rest = writeRest(path, ranks)
      end
      if emptied then
        local sibling = remove('b' .. node .. '\0', fields[6], emptied, 4, nodeBlock)
        fields[6] = fields[6] - 1
        if sibling then
          local its = readNode(sibling)
          its[5] = emptied
          writeNode(sibling, its)
        end
      end
      emptied = peersIn(fields) == 0 and fields[5] or nil
      writeNode(node, fields)
    end
    put(peer, false)
  end

  local function isEmpty()
    return peersIn(readNode(root)) == 0
  end

  -- Without peers a swarm is kept for its completions alone.
  local function setHeader(downloaded, nextDue, expiresAt)
    local fields = readNode(root)
    fields.rest = pack('<I4I4I4', downloaded, nextDue, expiresAt)
    writeNode(root, fields)
    if downloaded == 0 and peersIn(fields) == 0 then put('n' .. root, false) end
  end

  local function schedule(peer, second)
    due[peer] = second
    gone[peer] = nil
  end

  local function forget(peer)
    gone[peer] = true
    due[peer] = nil
  end

  -- In a list, since a table with thousands of arguments does not fit the stack.
  local function callWith(command, key, arguments)
    for from = 1, #arguments, 4000 do
      redis.call(command, key, unpack(arguments, from, math.min(from + 3999, #arguments)))
    end
  end

  -- What goes, goes first: a Redis without memory lets that pass, and then also what belongs to it.
  local function flush()
    local left, removed, added, written = {}, {}, {}, {}
    for peer in pairs(gone) do left[#left + 1] = peer end
    for peer, second in pairs(due) do
      added[#added + 1] = second
      added[#added + 1] = peer
    end
    for field in pairs(changed) do
      local value = cache[field]
      if value then
        written[#written + 1] = field
        written[#written + 1] = value
      else
        removed[#removed + 1] = field
      end
    end
    callWith('ZREM', dueKey, left)
    callWith('HDEL', swarm, removed)
    callWith('HSET', swarm, written)
    callWith('ZADD', dueKey, added)
    changed, gone, due = {}, {}, {}
  end

  -- Looks after whoever may be due by now: those who announced since are due later, the others go. Returns the second before which
  -- nobody else is due.
  local function expire(now)
    local peers = redis.call('ZRANGEBYSCORE', dueKey, '-inf', now, 'LIMIT', 0, dueMax)
    if #peers > 0 then
      local records = redis.call('HMGET', swarm, unpack(peers))
      for at, peer in ipairs(peers) do
        if cache[peer] == nil then cache[peer] = records[at] end
      end
    end
    for _, peer in ipairs(peers) do
      local record = get(peer)
      local second = record and unpackStruct('<I4', record)
      if not record then
        forget(peer)
      elseif second > now then
        put(peer, pack('<I4I4', second, second) .. sub(record, 9))
        schedule(peer, second)
      else
        leave(peer, record)
        forget(peer)
      end
    end
    flush()
    if #peers == dueMax then return now end
    return tonumber(redis.call('ZRANGE', dueKey, 0, 0, 'WITHSCORES')[2]) or never
  end

  return {
    get = get,
    put = put,
    enter = enter,
    leave = leave,
    schedule = schedule,
    forget = forget,
    isEmpty = isEmpty,
    setHeader = setHeader,
    flush = flush,
    expire = expire,
  }
end

-- Of the root's value: downloaded, second before which nobody is due, second at which the keys expire.
local function readHeader(value)
  if not value then return 0, never, 0 end
  return unpackStruct('<I4I4I4', value, 25)
end

-- Milliseconds: those of Redis, so that servers whose clocks differ agree; 0 in `given` asks for them.
local function readClock(given)
  if given > 0 then return given end
  local time = redis.call('TIME')
  return time[1] * 1000 + floor(time[2] / 1000)
end

-- Reads the number and the nonce of the last change; 0 and nothing before the first one.
local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
if not last then
  return { '0', '' }
end
return { string.match(last[1], '^%d+'), last[2][2] }

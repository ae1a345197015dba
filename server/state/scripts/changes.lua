-- Reads the changes after the one that is known. Returns "trimmed" where the log no longer reaches back to it, "rewound" where the log
-- ends before it or has another change in its place; else {number, {field, value, ...}}, ...
-- The number and the nonce of the change that is known; number 0: none.
local number, nonce, limit = ARGV[2], ARGV[3], ARGV[4]

local first = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
local firstNumber = first and numberOf(first[1]) or 1
local known = tonumber(number)
if firstNumber > known + 1 then
  return 'trimmed'
end
if known > 0 and firstNumber <= known then
  local last = redis.call('XRANGE', log, number .. '-0', number .. '-0')[1]
  if not last or last[2][2] ~= nonce then
    return 'rewound'
  end
elseif known > 0 and not first then
  return 'rewound'
end
return redis.call('XRANGE', log, '(' .. number .. '-0', '+', 'COUNT', limit)

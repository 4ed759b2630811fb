-- A request is over: give its slot or its place back, and turn what was reserved into what was used. Once.
-- ARGV: request, key id, tokens that count against the limits, 1 if the request itself shall not count (it never
--       ran), input tokens, output tokens, 1 if it was refused after all
-- Returns: 1 settled, 0 there was nothing to settle (settled before, or its reservation has run out)
local request, key, used = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_us()
local record = ROOT .. 'request:' .. request
local own, all = limit_key(key), limit_key(ALL)
local held = call('HMGET', record, 'state', 'at', 'cost', 'since', 'own_requests', 'own_tokens', 'all_requests', 'all_tokens')
call('ZREM', own .. ':leases', request)
call('ZREM', all .. ':leases', request)
if held[1] ~= 'leased' then leave_line(own, request) end -- who has a slot has left the line
if not held[1] then return 0 end
call('DEL', record)
local at, since = tonumber(held[2]), held[4] and now - held[4]
local share = 1 - used / math.max(1, tonumber(held[3])) -- of the reservation that goes back; below 0 more is taken

-- A bucket emptied by µs of its rate, or filled if they are fewer than none (only tokens, whose bucket is a minute's).
-- What was reserved before the bucket was last seen full has flowed back by itself: it is not given back once more.
local function given_back(stored, full, amount)
  if amount == 0 or amount > 0 and tonumber(full or 0) > at then return nil end
  stored = tonumber(stored or 0)
  local after = stored - amount
  if amount < 0 then after = math.min(math.max(stored, now) - amount, now + 2 * MINUTE) end
  return int(math.max(0, math.ceil(after)))
end

local function settle(name, requests, tokens)
  local stored = call('HMGET', name, 'tokens', 'tokens_full', 'held')
  local after = given_back(stored[1], stored[2], tokens * share)
  if since then -- how long a slot is held, on average (µs), for an honest Retry-After
    local mean = tonumber(stored[3] or since)
    mean = int(mean + 0.2 * (since - mean))
    if after then call('HSET', name, 'tokens', after, 'held', mean) else call('HSET', name, 'held', mean) end
  elseif after then
    call('HSET', name, 'tokens', after)
  end
  if ARGV[4] == '1' then
    stored = call('HMGET', name, 'requests', 'requests_full')
    after = given_back(stored[1], stored[2], tonumber(requests))
    if after then call('HSET', name, 'requests', after) end
  end
  if call('TTL', name) < 600 then call('EXPIRE', name, '600') end
end

settle(own, held[5], held[6])
settle(all, held[7], held[8])
count_usage(key, now, 'input_tokens', ARGV[5], 'output_tokens', ARGV[6], 'refused', ARGV[7])
return 1

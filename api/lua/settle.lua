-- A request is over: give its slot or its place back, and turn what was reserved into what was used. Once.
-- ARGV: request, key id, tokens that count against the limits, 1 if the request itself shall not count (it never
--       ran), input tokens, output tokens, 1 if it was refused after all
-- Returns: 1 settled, 0 there was nothing to settle (settled before, or its reservation has run out)
local request, key, used = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_us()

-- Empty a bucket by µs of its rate, or fill it if they are fewer than none (only tokens, whose bucket is a minute's).
-- What was reserved before the bucket was last seen full has flowed back by itself: it is not given back once more.
local function give_back(scope, field, amount, reserved)
  if amount > 0 and tonumber(redis.call('HGET', limit_key(scope), field .. '_full') or 0) > reserved then return end
  local stored = tonumber(redis.call('HGET', limit_key(scope), field) or 0)
  local after = stored - amount
  if amount < 0 then after = math.min(math.max(stored, now) - amount, now + 2 * MINUTE) end
  if amount ~= 0 then redis.call('HSET', limit_key(scope), field, int(math.max(0, math.ceil(after)))) end
end

give_up_place(key, request)
for _, scope in ipairs({key, ALL}) do redis.call('ZREM', leases_key(scope), request) end
local held = redis.call('HMGET', request_key(request), 'cost', 'since', 'own_requests', 'own_tokens', 'all_requests', 'all_tokens', 'at')
if not held[1] then return 0 end
redis.call('DEL', request_key(request))
local share = 1 - used / math.max(1, tonumber(held[1])) -- of the reservation that goes back; below 0 more is taken
for scope, charges in pairs({[key] = {held[3], held[4]}, [ALL] = {held[5], held[6]}}) do
  give_back(scope, 'requests', ARGV[4] == '1' and tonumber(charges[1]) or 0, tonumber(held[7]))
  give_back(scope, 'tokens', tonumber(charges[2]) * share, tonumber(held[7]))
  if held[2] then -- how long a slot is held, on average (µs), for an honest Retry-After
    local mean = tonumber(redis.call('HGET', limit_key(scope), 'held') or (now - held[2]))
    redis.call('HSET', limit_key(scope), 'held', int(mean + 0.2 * ((now - held[2]) - mean)))
  end
  if redis.call('TTL', limit_key(scope)) < 600 then redis.call('EXPIRE', limit_key(scope), 600) end
end
count_usage(key, now, 'input_tokens', ARGV[5], 'output_tokens', ARGV[6], 'refused', ARGV[7])
return 1

-- Put before every script of this folder by workers/scripts.py. Names mirror workers/redis_keys.py.
-- Every script runs on the primary's TIME and may be replayed: doing it twice leaves what doing it once left.
-- A scope is an API key's id, or ALL for the limits that everybody shares.
-- Every chat request waits for one of these scripts. Next to the calls themselves it is dear in them to write a number
-- as a string (slowest where Redis does it: it is given strings), to make a table or a function, and to name a key.
local ROOT, ALL = 'velocity:', 'all'
local MINUTE = 60000000 -- µs
local DAY = 86400000000 -- µs
local KEEP_USAGE = '34560000' -- 400 days, in s
local call = redis.call

-- A scope's buckets. Its other keys are named after it: …:leases, …:waiting and …:places, all three sorted sets.
local function limit_key(scope) return ROOT .. 'limit:' .. scope end

-- The nearest integer as a string. %d is far quicker than %.0f; it takes a 64-bit Redis for a time in µs.
local function int(value) return string.format('%d', math.floor(value + 0.5)) end

local function now_us()
  local t = call('TIME')
  return t[1] * 1000000 + t[2]
end

local function count_usage(account, now, ...)
  local key = ROOT .. 'usage:' .. account .. ':' .. math.floor(now / DAY)
  for i = 1, select('#', ...), 2 do
    local what, count = select(i, ...)
    if tonumber(count) ~= 0 then call('HINCRBY', key, what, count) end
  end
  call('EXPIRE', key, KEEP_USAGE)
end

-- A bucket is one number, the theoretical arrival time in µs (GCRA): how far it lies ahead of now is what is used.
-- `rate` per minute (0 = no limit), `most` what fits into the bucket, `cost` what is asked of it.
-- Settling may leave a debt of up to another bucketful. What lies further ahead (the clock stepped back, a limit was
-- lowered) is cut to that by whoever sees it first, and drains from then on: nothing locks out for longer.
local function bucket(field, stored, now, rate, most, cost)
  if rate == 0 then return {rate = 0, charge = 0, late = 0, before = now} end
  local charge, span = cost * MINUTE / rate, most * MINUTE / rate
  stored = tonumber(stored or 0)
  local before = math.max(now, math.min(stored, now + 2 * span))
  return {field = field, rate = rate, charge = charge, span = span, before = before, cut = stored > before,
    late = before + charge - now - span, -- µs until the cost fits
    never = cost > most}
end

local function left(b, used_until, now)
  if b.rate == 0 then return -1, 0 end
  local free = (b.span - (used_until - now) + 0.5) * b.rate / MINUTE
  return math.max(0, math.floor(free)), math.ceil(used_until - now)
end

-- The buckets of one scope that are filled and emptied together: of requests, and of tokens.
local function buckets(name, now, rpm, burst, tpm, cost_requests, cost_tokens)
  local stored = (rpm > 0 or tpm > 0) and call('HMGET', name, 'requests', 'tokens') or {}
  return bucket('requests', stored[1], now, rpm, burst, cost_requests),
    bucket('tokens', stored[2], now, tpm, tpm, cost_tokens)
end

local function leave_line(name, request)
  call('ZREM', name .. ':waiting', request)
  call('ZREM', name .. ':places', request)
end

-- `over` is when the lease is (µs), `keep` for how many ms its key is kept: for longer.
local function hold_lease(leases, request, over, keep)
  call('ZADD', leases, over, request)
  call('PEXPIRE', leases, keep)
end

local function hold_place(name, request, over, keep)
  call('ZADD', name .. ':places', over, request)
  call('PEXPIRE', name .. ':places', keep)
  call('PEXPIRE', name .. ':waiting', keep)
end

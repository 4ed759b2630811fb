-- Put before every script of this folder by workers/scripts.py. Names mirror workers/redis_keys.py.
-- Every script runs on the primary's TIME and may be replayed: doing it twice leaves what doing it once left.
-- A scope is an API key's id, or ALL for the limits that everybody shares.
local ROOT, ALL = 'velocity:', 'all'
local MINUTE = 60000000 -- µs
local KEEP_USAGE = 34560000 -- 400 days, in s

local function limit_key(scope) return ROOT .. 'limit:' .. scope end
local function leases_key(scope) return ROOT .. 'limit:' .. scope .. ':leases' end
local function waiting_key(scope) return ROOT .. 'limit:' .. scope .. ':waiting' end
local function places_key(scope) return ROOT .. 'limit:' .. scope .. ':places' end
local function request_key(request) return ROOT .. 'request:' .. request end

local function int(value) return string.format('%.0f', tonumber(value) or 0) end

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function count_usage(account, now, ...)
  local key = ROOT .. 'usage:' .. account .. ':' .. int(math.floor(now / 86400000000))
  local pairs = {...}
  for i = 1, #pairs, 2 do
    if tonumber(pairs[i + 1]) ~= 0 then redis.call('HINCRBY', key, pairs[i], pairs[i + 1]) end
  end
  redis.call('EXPIRE', key, KEEP_USAGE)
end

-- A bucket is one number, the theoretical arrival time in µs (GCRA): how far it lies ahead of now is what is used.
-- `rate` per minute (0 = no limit), `most` what fits into the bucket, `cost` what is asked of it.
-- Settling may leave a debt of up to another bucketful. What lies further ahead (the clock stepped back, a limit was
-- lowered) is cut to that by whoever sees it first, and drains from then on: nothing locks out for longer.
local function bucket(scope, field, now, rate, most, cost)
  local b = {field = field, rate = rate}
  if rate == 0 then return b end
  b.charge = cost * MINUTE / rate
  b.span = most * MINUTE / rate
  local stored = tonumber(redis.call('HGET', limit_key(scope), field) or 0)
  b.before = math.max(now, math.min(stored, now + 2 * b.span))
  b.cut = stored > b.before
  b.late = b.before + b.charge - now - b.span -- µs until the cost fits
  b.never = cost > most
  return b
end

local function left(b, used_until, now)
  if b.rate == 0 then return -1, 0 end
  local free = (b.span - (used_until - now) + 0.5) * b.rate / MINUTE
  return math.max(0, math.floor(free)), math.ceil(used_until - now)
end

-- The buckets of one scope that are filled and emptied together.
local function buckets(scope, now, rpm, burst, tpm, cost_requests, cost_tokens)
  return {scope = scope, requests = bucket(scope, 'requests', now, rpm, burst, cost_requests),
    tokens = bucket(scope, 'tokens', now, tpm, tpm, cost_tokens)}
end

local function drop_dead(scope, now)
  redis.call('ZREMRANGEBYSCORE', leases_key(scope), '-inf', int(now))
  for _, request in ipairs(redis.call('ZRANGEBYSCORE', places_key(scope), '-inf', int(now))) do
    redis.call('ZREM', waiting_key(scope), request)
    redis.call('ZREM', places_key(scope), request)
  end
end

local function give_up_place(scope, request)
  redis.call('ZREM', waiting_key(scope), request)
  redis.call('ZREM', places_key(scope), request)
end

local function hold_lease(scope, request, now, lease)
  redis.call('ZADD', leases_key(scope), int(now + lease), request)
  redis.call('PEXPIRE', leases_key(scope), int(lease / 1000 + 1000))
end

local function hold_place(scope, request, now, lease)
  redis.call('ZADD', places_key(scope), int(now + lease), request)
  redis.call('PEXPIRE', places_key(scope), int(lease / 1000 + 1000))
  redis.call('PEXPIRE', waiting_key(scope), int(lease / 1000 + 1000))
end

-- Decide on one interactive request: requests and tokens per minute and concurrency, of its key and of all keys.
-- All is checked, then all is applied: a refused request leaves nothing behind but its count in the usage.
-- Called again with the same request it says how that one stands: that is how a waiting request asks for its slot.
-- ARGV: request, key id, version of the key's record ('' = not checked), tokens to reserve, 1 if it may wait,
--       lease (µs), life of an unsettled reservation (ms), most that may wait per key,
--       the key's rpm, burst, tpm, concurrency, then the same four for all keys (0 = no limit)
-- Returns: verdict, reason, µs to wait, now (µs), requests left, µs until all are, tokens left, µs until all are,
--          how many wait before it
--   verdict: 'stale' (the key's record has changed), 'admitted', 'waiting' or 'refused'
--   reason:  '' or what was lacking: requests, tokens, concurrency, each also as global_…; never_fits; max_waiting
local request, key = ARGV[1], ARGV[2]
if ARGV[3] ~= '' and redis.call('HGET', ROOT .. 'key:' .. key, 'version') ~= ARGV[3] then return {'stale'} end
local cost, may_wait, lease, most_waiting = tonumber(ARGV[4]), ARGV[5] == '1', tonumber(ARGV[6]), tonumber(ARGV[8])
local now = now_us()
local known = redis.call('HGET', request_key(request), 'state')
local function n(i) return tonumber(ARGV[i]) end
local own = buckets(key, now, n(9), n(10), n(11), known and 0 or 1, known and 0 or cost)
local all = buckets(ALL, now, n(13), n(14), n(15), known and 0 or 1, known and 0 or cost)
local own_slots, all_slots = n(12), n(16)

local function answer(verdict, reason, wait, ahead)
  local used = verdict ~= 'refused' and 'after' or 'before'
  local function until_(b) return b.rate == 0 and 0 or (used == 'after' and b.before + b.charge or b.before) end
  local requests, requests_reset = left(own.requests, until_(own.requests), now)
  local tokens, tokens_reset = left(own.tokens, until_(own.tokens), now)
  return {verdict, reason, math.ceil(wait), int(now), requests, requests_reset, tokens, tokens_reset, ahead}
end

local function refuse(reason, wait, ahead)
  count_usage(key, now, 'refused', 1)
  return answer('refused', reason, wait, ahead)
end

-- One whose lease ran out (its process was cut off from here) has lost its slot, but what it has paid for is paid.
if known == 'leased' and tonumber(redis.call('ZSCORE', leases_key(key), request) or 0) > now then
  return answer('admitted', '', 0, 0)
end

-- What can't pass now, with the longest wait: after that, everything else has room as well.
if not known then
  local lacking, wait = nil, 0.5
  for _, scope in ipairs({own, all}) do
    for _, b in ipairs({scope.requests, scope.tokens}) do
      if b.rate > 0 then
        if b.cut then redis.call('HSET', limit_key(scope.scope), b.field, int(math.floor(b.before))) end
        if b.never then return refuse('never_fits', 0, 0) end
        if b.late > wait then lacking, wait = (scope == all and 'global_' or '') .. b.field, b.late end
      end
    end
  end
  if lacking then return refuse(lacking, wait, 0) end
end

drop_dead(key, now)
drop_dead(ALL, now)
local ahead = redis.call('ZRANK', waiting_key(key), request) or redis.call('ZCARD', waiting_key(key))
local lacking = nil
if own_slots > 0 and redis.call('ZCARD', leases_key(key)) + ahead >= own_slots then lacking = 'concurrency' end
if all_slots > 0 and redis.call('ZCARD', leases_key(ALL)) + ahead >= all_slots then
  lacking = lacking or 'global_concurrency'
end
local wait = 0
if lacking then -- nobody knows when a slot is given back: what the slots were held for lately says about when
  local slots = lacking == 'concurrency' and own_slots or all_slots
  local held = tonumber(redis.call('HGET', limit_key(lacking == 'concurrency' and key or ALL), 'held') or 0)
  wait = held * (ahead + 1) / slots
  if not known and not may_wait then return refuse(lacking, wait, ahead) end
  if not known and ahead >= most_waiting then return refuse('max_waiting', wait, ahead) end
end

if not known then
  for _, scope in ipairs({own, all}) do
    local full = 0 -- µs until both buckets are: until then what is used must not be forgotten
    for _, b in ipairs({scope.requests, scope.tokens}) do
      if b.rate > 0 then
        redis.call('HSET', limit_key(scope.scope), b.field, int(math.ceil(b.before + b.charge)))
        if b.before <= now then redis.call('HSET', limit_key(scope.scope), b.field .. '_full', int(now)) end
        full = math.max(full, b.before + b.charge - now)
      end
    end
    if full > 0 then redis.call('PEXPIRE', limit_key(scope.scope), int(full / 1000 + 600000)) end
  end
  redis.call('HSET', request_key(request), 'key', key, 'at', int(now), 'cost', int(cost), 'own_requests', int(own.requests.charge or 0),
    'own_tokens', int(own.tokens.charge or 0), 'all_requests', int(all.requests.charge or 0),
    'all_tokens', int(all.tokens.charge or 0))
  redis.call('PEXPIRE', request_key(request), ARGV[7])
end
if lacking then
  redis.call('ZADD', waiting_key(key), 'NX', int(now), request)
  hold_place(key, request, now, lease)
  redis.call('HSET', request_key(request), 'state', 'waiting')
  return answer('waiting', lacking, wait, ahead)
end
give_up_place(key, request)
hold_lease(key, request, now, lease)
hold_lease(ALL, request, now, lease)
redis.call('HSET', request_key(request), 'state', 'leased')
if redis.call('HSETNX', request_key(request), 'since', int(now)) == 1 then count_usage(key, now, 'requests', 1) end
return answer('admitted', '', 0, 0)

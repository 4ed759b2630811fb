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
if ARGV[3] ~= '' and call('HGET', ROOT .. 'key:' .. key, 'version') ~= ARGV[3] then return {'stale'} end
local own, all = limit_key(key), limit_key(ALL)
local own_leases, all_leases, waiting = own .. ':leases', all .. ':leases', own .. ':waiting'
local own_slots, all_slots = tonumber(ARGV[12]), tonumber(ARGV[16])
local now = now_us()
local at = int(now)
local record = ROOT .. 'request:' .. request
local known = call('HGET', record, 'state')
local requests, tokens = known and 0 or 1, known and 0 or tonumber(ARGV[4])
local own_requests, own_tokens =
  buckets(own, now, tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]), requests, tokens)
local all_requests, all_tokens =
  buckets(all, now, tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15]), requests, tokens)

local function answer(verdict, reason, wait, ahead)
  local taken = 1
  if verdict == 'refused' then
    taken = 0
    count_usage(key, now, 'refused', '1')
  end
  local requests_left, requests_reset = left(own_requests, own_requests.before + taken * own_requests.charge, now)
  local tokens_left, tokens_reset = left(own_tokens, own_tokens.before + taken * own_tokens.charge, now)
  return {verdict, reason, math.ceil(wait), at, requests_left, requests_reset, tokens_left, tokens_reset, ahead}
end

-- One whose lease ran out (its process was cut off from here) has lost its slot, but what it has paid for is paid.
if known == 'leased' and tonumber(call('ZSCORE', own_leases, request) or 0) > now then
  return answer('admitted', '', 0, 0)
end

-- What can't pass now, with the longest wait: after that, everything else has room as well.
if not known then
  local lacking, wait = nil, 0.5
  for i, b in ipairs({own_requests, own_tokens, all_requests, all_tokens}) do
    if b.cut then call('HSET', i > 2 and all or own, b.field, int(math.floor(b.before))) end
    if b.never then return answer('refused', 'never_fits', 0, 0) end
    if b.late > wait then lacking, wait = (i > 2 and 'global_' or '') .. b.field, b.late end
  end
  if lacking then return answer('refused', lacking, wait, 0) end
end

-- A lease that is over holds no slot, a place that is over none in the line. Nobody has a place who is not in line.
call('ZREMRANGEBYSCORE', own_leases, '-inf', at)
call('ZREMRANGEBYSCORE', all_leases, '-inf', at)
local ahead, in_line = call('ZCARD', waiting), false
if ahead > 0 then
  for _, gone in ipairs(call('ZRANGEBYSCORE', own .. ':places', '-inf', at)) do leave_line(own, gone) end
  in_line = call('ZRANK', waiting, request)
  ahead = in_line or call('ZCARD', waiting)
end
local lacking = nil
if own_slots > 0 and call('ZCARD', own_leases) + ahead >= own_slots then lacking = 'concurrency' end
if all_slots > 0 and call('ZCARD', all_leases) + ahead >= all_slots then lacking = lacking or 'global_concurrency' end
local wait = 0
if lacking then -- nobody knows when a slot is given back: what the slots were held for lately says about when
  local slots = lacking == 'concurrency' and own_slots or all_slots
  local held = tonumber(call('HGET', lacking == 'concurrency' and own or all, 'held') or 0)
  wait = held * (ahead + 1) / slots
  if not known and ARGV[5] ~= '1' then return answer('refused', lacking, wait, ahead) end
  if not known and ahead >= tonumber(ARGV[8]) then return answer('refused', 'max_waiting', wait, ahead) end
end

-- Take from a bucket what is asked of it. Returns µs until it is full again: until then it must not be forgotten.
local function charge(name, b)
  if b.rate == 0 then return 0 end
  local after = b.before + b.charge
  if b.before > now then
    call('HSET', name, b.field, int(math.ceil(after)))
  else
    call('HSET', name, b.field, int(math.ceil(after)), b.field .. '_full', at)
  end
  return after - now
end

local state = lacking and 'waiting' or 'leased'
if known then
  call('HSET', record, 'state', state)
else
  local own_full = math.max(charge(own, own_requests), charge(own, own_tokens))
  local all_full = math.max(charge(all, all_requests), charge(all, all_tokens))
  if own_full > 0 then call('PEXPIRE', own, int(own_full / 1000 + 600000)) end
  if all_full > 0 then call('PEXPIRE', all, int(all_full / 1000 + 600000)) end
  call('HSET', record, 'key', key, 'at', at, 'cost', ARGV[4], 'state', state,
    'own_requests', int(own_requests.charge), 'own_tokens', int(own_tokens.charge),
    'all_requests', int(all_requests.charge), 'all_tokens', int(all_tokens.charge))
  call('PEXPIRE', record, ARGV[7])
end
local over, keep = int(now + ARGV[6]), int(ARGV[6] / 1000 + 1000)
if lacking then
  call('ZADD', waiting, 'NX', at, request)
  hold_place(own, request, over, keep)
  return answer('waiting', lacking, wait, ahead)
end
if in_line then leave_line(own, request) end
hold_lease(own_leases, request, over, keep)
hold_lease(all_leases, request, over, keep)
if call('HSETNX', record, 'since', at) == 1 then count_usage(key, now, 'requests', '1') end
return answer('admitted', '', 0, 0)

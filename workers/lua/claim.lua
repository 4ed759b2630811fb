-- Lease the unit that is next in a lane to a worker.
-- ARGV: lane, owner (random per call: a replay returns the same lease), lease (ms), busy accounts (tenant/account) …
-- Returns: nil when nothing is pending, else job, tenant, account, unit, epoch, first item, items, endpoint, lane,
--          bits of the items done
local lane, owner, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local ticket, busy = ROOT .. 'claim:' .. owner, {}
for i = 4, #ARGV do busy[ARGV[i]] = true end
local function answer(job, unit)
  local lead = redis.call('HMGET', unit_key(job, unit), 'epoch', 'first', 'count', 'lane')
  local first, count = tonumber(lead[2]), tonumber(lead[3])
  local bits = ''
  if count > 0 then bits = redis.call('GETRANGE', done_key(job), math.floor(first / 8), math.floor((first + count - 1) / 8)) end
  local about = redis.call('HMGET', job_key(job), 'tenant', 'account', 'endpoint')
  return {job, about[1], about[2], unit, lead[1], lead[2], lead[3], about[3], lead[4], bits}
end
local before = redis.call('HMGET', ticket, 'job', 'unit')
if before[1] then return answer(before[1], before[2]) end
local found = pop(lane, busy)
if not found then return false end
local job, unit = string.match(found, '^(.-)/(.+)$')
local key = unit_key(job, unit)
redis.call('HINCRBY', key, 'epoch', 1)
redis.call('HSET', key, 'state', 'leased', 'owner', owner, 'progress', 0)
redis.call('ZADD', LEASES, now_ms() + lease, found)
if redis.call('HGET', job_key(job), 'status') == 'queued' then
  redis.call('HSET', job_key(job), 'status', 'in_progress', 'in_progress_at', int(now_ms()))
end
redis.call('HSET', ticket, 'job', job, 'unit', unit)
redis.call('PEXPIRE', ticket, lease)
return answer(job, unit)

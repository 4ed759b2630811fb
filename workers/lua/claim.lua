-- Lease the pending unit with the earliest start tag to a worker.
-- ARGV: lane (or 'final'), owner (random per call: a replay returns the same lease), lease (ms)
-- Returns: nil when nothing is pending, else job, tenant, unit, epoch, first item, items, bits of the items done
local lane, owner, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local ticket = ROOT .. 'claim:' .. owner
local function answer(job, unit)
  local lead = redis.call('HMGET', unit_key(job, unit), 'epoch', 'first', 'count')
  local first, count = tonumber(lead[2]), tonumber(lead[3])
  local bits = ''
  if count > 0 then bits = redis.call('GETRANGE', done_key(job), math.floor(first / 8), math.floor((first + count - 1) / 8)) end
  return {job, redis.call('HGET', job_key(job), 'tenant'), unit, lead[1], lead[2], lead[3], bits}
end
local before = redis.call('HMGET', ticket, 'job', 'unit')
if before[1] then return answer(before[1], before[2]) end
while true do
  local popped = redis.call('ZPOPMIN', pending_key(lane))
  if #popped == 0 then return false end
  local job, unit = string.match(popped[1], '^(.-)/(.+)$')
  local key = unit_key(job, unit)
  if redis.call('EXISTS', key) == 1 then
    local score = tonumber(popped[2])
    if score > tonumber(redis.call('GET', ROOT .. 'virtual:' .. lane) or 0) then
      redis.call('SET', ROOT .. 'virtual:' .. lane, int(score))
    end
    redis.call('HINCRBY', key, 'epoch', 1)
    redis.call('HSET', key, 'state', 'leased', 'owner', owner, 'progress', 0)
    redis.call('ZADD', LEASES, now_ms() + lease, popped[1])
    if redis.call('HGET', job_key(job), 'status') == 'queued' then
      redis.call('HSET', job_key(job), 'status', 'in_progress', 'in_progress_at', int(now_ms()))
    end
    redis.call('HSET', ticket, 'job', job, 'unit', unit)
    redis.call('PEXPIRE', ticket, lease)
    return answer(job, unit)
  end
end

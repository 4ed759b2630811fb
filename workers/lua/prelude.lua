-- Put before every script of this folder by workers/scripts.py. Names mirror workers/redis_keys.py.
-- Every script runs on the primary's TIME and may be replayed: doing it twice leaves what doing it once left.
local ROOT = 'velocity:'
local LEASES, DEADLINES = ROOT .. 'leases', ROOT .. 'deadlines'
local FINAL = 'final' -- the unit of work that merges a job's results once all its shards are closed, and its own lane

local function job_key(job) return ROOT .. 'job:' .. job end
local function unit_key(job, unit) return ROOT .. 'job:' .. job .. ':unit:' .. unit end
local function done_key(job) return ROOT .. 'job:' .. job .. ':done' end
local function failed_key(job) return ROOT .. 'job:' .. job .. ':failed' end
local function pending_key(lane) return ROOT .. 'pending:' .. lane end
local function lane_of(job, unit) return unit == FINAL and FINAL or redis.call('HGET', job_key(job), 'lane') end
local function bulk_key(tenant) return ROOT .. 'tenant:' .. tenant .. ':bulk' end
local function member(job, unit) return job .. '/' .. unit end

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function int(value) return string.format('%.0f', tonumber(value) or 0) end

-- Usage per account and day (UTC), kept for 400 days as the api's own counts are.
local function count_usage(account, ...)
  local key = ROOT .. 'usage:' .. account .. ':' .. int(math.floor(now_ms() / 86400000))
  local pairs = {...}
  for i = 1, #pairs, 2 do
    if tonumber(pairs[i + 1]) ~= 0 then redis.call('HINCRBY', key, pairs[i], pairs[i + 1]) end
  end
  redis.call('EXPIRE', key, 34560000)
end

local function stopping(status) return status == 'cancelling' or status == 'expiring' end

-- All shards closed: queue the unit that writes the result files.
local function finalize_when_closed(job)
  local key = job_key(job)
  if tonumber(redis.call('HGET', key, 'open_shards')) > 0 then return end
  local status = redis.call('HGET', key, 'status')
  local outcome = ({cancelling = 'cancelled', expiring = 'expired', in_progress = 'completed', queued = 'completed'})[status]
  if not outcome then return end
  redis.call('HSET', key, 'status', 'finalizing', 'outcome', outcome, 'finalizing_at', int(now_ms()))
  redis.call('ZREM', DEADLINES, job)
  redis.call('HSET', unit_key(job, FINAL), 'state', 'pending', 'epoch', 0, 'first', 0, 'count', 0, 'score', 0, 'crashes', 0)
  redis.call('ZADD', pending_key(FINAL), 0, member(job, FINAL))
end

-- A shard whose items are all finished, or whose job is stopping, is worked on no more.
local function close_shard(job, unit)
  local key = unit_key(job, unit)
  if redis.call('HGET', key, 'state') == 'closed' then return end
  redis.call('HSET', key, 'state', 'closed', 'owner', '')
  redis.call('ZREM', LEASES, member(job, unit))
  redis.call('HINCRBY', job_key(job), 'open_shards', -1)
  finalize_when_closed(job)
end

-- Back to pending, or closed if its job is stopping (the unit FINAL always goes back).
local function give_back(job, unit)
  local key = unit_key(job, unit)
  redis.call('ZREM', LEASES, member(job, unit))
  if unit ~= FINAL and stopping(redis.call('HGET', job_key(job), 'status')) then return close_shard(job, unit) end
  redis.call('HSET', key, 'state', 'pending', 'owner', '')
  redis.call('ZADD', pending_key(lane_of(job, unit)), redis.call('HGET', key, 'score'), member(job, unit))
end

-- No shard of the job starts any more; those that run learn of it at their next commit.
local function stop_job(job, status)
  local key = job_key(job)
  local state = redis.call('HMGET', key, 'status', 'lane', 'shards')
  if state[1] ~= 'queued' and state[1] ~= 'in_progress' then return 0 end
  redis.call('HSET', key, 'status', status, status .. '_at', int(now_ms()))
  redis.call('ZREM', DEADLINES, job)
  for shard = 0, tonumber(state[3]) - 1 do
    if redis.call('ZREM', pending_key(state[2]), member(job, shard)) == 1 then close_shard(job, shard) end
  end
  return 1
end

-- Whether this caller still holds the lease it once got.
local function holds(job, unit, epoch, owner)
  local lease = redis.call('HMGET', unit_key(job, unit), 'epoch', 'owner', 'state')
  return lease[1] == epoch and lease[2] == owner and lease[3] == 'leased'
end

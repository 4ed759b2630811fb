-- Put before every script of this folder by workers/scripts.py. Names mirror workers/redis_keys.py.
-- Every script runs on the primary's TIME and may be replayed: doing it twice leaves what doing it once left.
local ROOT = 'velocity:'
local LEASES, DEADLINES, OUTBOX, FINISHED = ROOT .. 'leases', ROOT .. 'deadlines', ROOT .. 'outbox', ROOT .. 'finished'
local BULK = ROOT .. 'bulk' -- hash: items accepted and not finished, and how fast items are finished
local FINAL = 'final' -- the unit of work that merges a job's results once all its shards are closed, and its own lane
local CRASHES = 3 -- a shard that took so many workers along goes to the quarantine
local OUTCOMES = {cancelling = 'cancelled', expiring = 'expired', failing = 'failed', in_progress = 'completed', queued = 'completed'}

local function job_key(job) return ROOT .. 'job:' .. job end
local function unit_key(job, unit) return ROOT .. 'job:' .. job .. ':unit:' .. unit end
local function done_key(job) return ROOT .. 'job:' .. job .. ':done' end
local function failed_key(job) return ROOT .. 'job:' .. job .. ':failed' end
local function bulk_key(tenant) return ROOT .. 'tenant:' .. tenant .. ':bulk' end
local function jobs_key(tenant) return ROOT .. 'tenant:' .. tenant .. ':jobs' end
local function batches_key(tenant) return ROOT .. 'tenant:' .. tenant .. ':batches' end
local function idempotency_key(tenant) return ROOT .. 'tenant:' .. tenant .. ':idempotency' end
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

-- Items finished lately, each weighing less with every second (by 1/e per minute): divided by 60 their rate per second.
local function count_recent(key, new)
  local before, now = redis.call('HMGET', key, 'recent', 'recent_at', 'recent_since'), now_ms()
  local recent = 0
  if before[1] then recent = tonumber(before[1]) * math.exp(math.min(0, (tonumber(before[2]) - now) / 60000)) end
  redis.call('HSET', key, 'recent', string.format('%.6f', recent + new), 'recent_at', int(now), 'recent_since', before[3] or int(now))
end

-- The queue of a lane: tenants share it fairly, and the accounts of a tenant share the tenant's part. Each node (the lane,
-- the tenant in it) is a sorted set of its waiting children by virtual start tag: what they were served so far. The units of
-- an account stand in the order of their score.
local function lane_key(lane) return ROOT .. 'pending:' .. lane end
local function tenant_key(lane, tenant) return lane_key(lane) .. ':' .. tenant end
local function account_key(lane, tenant, account) return tenant_key(lane, tenant) .. ':' .. account end

-- A child that was away starts no earlier than where the others are: time away is not saved up.
local function join(node, child)
  if redis.call('ZSCORE', node, child) then return end
  local tag = math.max(tonumber(redis.call('GET', node .. '|clock') or 0), tonumber(redis.call('HGET', node .. '|tags', child) or 0))
  redis.call('ZADD', node, int(tag), child)
end

-- A child was served: it comes again `cost` later, or leaves if nothing of it waits.
local function serve(node, child, cost, waits)
  local tag = tonumber(redis.call('ZSCORE', node, child))
  redis.call('SET', node .. '|clock', int(math.max(tag, tonumber(redis.call('GET', node .. '|clock') or 0))))
  redis.call('HSET', node .. '|tags', child, int(tag + cost))
  if waits then redis.call('ZADD', node, int(tag + cost), child) else redis.call('ZREM', node, child) end
end

local function push(job, unit)
  local owner, key = redis.call('HMGET', job_key(job), 'tenant', 'account'), unit_key(job, unit)
  local state = redis.call('HMGET', key, 'lane', 'score')
  redis.call('HSET', key, 'state', 'pending', 'owner', '')
  join(lane_key(state[1]), owner[1])
  join(tenant_key(state[1], owner[1]), owner[2])
  if redis.call('ZADD', account_key(state[1], owner[1], owner[2]), state[2], member(job, unit)) == 1 then
    redis.call('HINCRBY', ROOT .. 'pending', state[1], 1)
  end
end

-- The next unit of a lane whose account is not in `busy`, as "job/unit"; nil if there is none.
local function pop(lane, busy)
  local node = lane_key(lane)
  for _, tenant in ipairs(redis.call('ZRANGE', node, 0, -1)) do
    local accounts = tenant_key(lane, tenant)
    for _, account in ipairs(redis.call('ZRANGE', accounts, 0, -1)) do
      local units = account_key(lane, tenant, account)
      while not busy[tenant .. '/' .. account] do
        local popped = redis.call('ZPOPMIN', units)
        if #popped == 0 then
          redis.call('ZREM', accounts, account)
          break
        end
        redis.call('HINCRBY', ROOT .. 'pending', lane, -1)
        local job, unit = string.match(popped[1], '^(.-)/(.+)$')
        local cost = redis.call('HGET', unit_key(job, unit), 'count')
        if cost then
          cost = math.max(1, tonumber(cost))
          serve(accounts, account, cost, redis.call('EXISTS', units) == 1)
          serve(node, tenant, cost, redis.call('EXISTS', accounts) == 1)
          return popped[1]
        end
      end
    end
    if redis.call('EXISTS', accounts) == 0 then redis.call('ZREM', node, tenant) end
  end
end

-- Take a waiting unit out of its queue. Returns whether it was there.
local function withdraw(job, unit)
  local owner, lane = redis.call('HMGET', job_key(job), 'tenant', 'account'), redis.call('HGET', unit_key(job, unit), 'lane')
  if not lane or redis.call('ZREM', account_key(lane, owner[1], owner[2]), member(job, unit)) == 0 then return false end
  redis.call('HINCRBY', ROOT .. 'pending', lane, -1)
  return true
end

local function stopping(status) return status == 'cancelling' or status == 'expiring' or status == 'failing' end

-- All shards closed: queue the unit that writes the result files.
local function finalize_when_closed(job)
  local key = job_key(job)
  if tonumber(redis.call('HGET', key, 'open_shards')) > 0 then return end
  local outcome = OUTCOMES[redis.call('HGET', key, 'status')]
  if not outcome then return end
  redis.call('HSET', key, 'status', 'finalizing', 'outcome', outcome, 'finalizing_at', int(now_ms()))
  redis.call('ZREM', DEADLINES, job)
  redis.call('HSET', unit_key(job, FINAL), 'lane', FINAL, 'epoch', 0, 'first', 0, 'count', 0, 'score', 0, 'crashes', 0)
  push(job, FINAL)
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

-- Back to the queue, or closed if its job is stopping (the unit FINAL always goes back). A unit that took a worker along
-- (`crashed`) too often goes to the quarantine instead.
local function give_back(job, unit, crashed)
  local key = unit_key(job, unit)
  redis.call('ZREM', LEASES, member(job, unit))
  if unit ~= FINAL and stopping(redis.call('HGET', job_key(job), 'status')) then return close_shard(job, unit) end
  if crashed and redis.call('HINCRBY', key, 'crashes', 1) >= CRASHES and unit ~= FINAL then
    redis.call('HSET', key, 'lane', 'quarantine', 'crashes', 0)
  end
  push(job, unit)
end

-- No shard of the job starts any more; those that run learn of it at their next commit.
local function stop_job(job, status)
  local key = job_key(job)
  local state = redis.call('HMGET', key, 'status', 'shards', 'held')
  if (state[1] ~= 'queued' and state[1] ~= 'in_progress') or state[3] then return 0 end
  redis.call('HSET', key, 'status', status, status .. '_at', int(now_ms()))
  redis.call('ZREM', DEADLINES, job)
  for shard = 0, tonumber(state[2]) - 1 do
    if withdraw(job, shard) then close_shard(job, shard) end
  end
  return 1
end

-- Make finished items count. Returns how many of them are new. `failed_from` is the place in `items` of the first failed one.
local function count_items(job, unit, segment, length, items, failed_from)
  local key, new, failed = unit_key(job, unit), 0, 0
  redis.call('HSET', key, 'segment:' .. segment, int(length))
  for i, item in ipairs(items) do
    if redis.call('SETBIT', done_key(job), item, 1) == 0 then
      new = new + 1
      if i >= failed_from then
        redis.call('SETBIT', failed_key(job), item, 1)
        failed = failed + 1
      end
    end
  end
  redis.call('HINCRBY', job_key(job), 'completed', new - failed)
  redis.call('HINCRBY', job_key(job), 'failed', failed)
  redis.call('HINCRBY', key, 'finished', new)
  redis.call('HINCRBY', BULK, 'queued', 0 - new) -- not -new: a negative zero is no integer
  return new
end

-- A field of the job's hash; the job that this one is a retry of learns of it, if it is still there.
local function describe(job, field, value)
  redis.call('HSET', job_key(job), field, value)
  if field == 'retry_of' and redis.call('EXISTS', job_key(value)) == 1 then redis.call('HSET', job_key(value), 'retried_by', job) end
end

local function list_job(tenant, job, created)
  redis.call('ZADD', jobs_key(tenant), created, job)
  if string.sub(job, 1, 6) == 'batch_' then redis.call('ZADD', batches_key(tenant), created, job) end
end

-- Whether this caller still holds the lease it once got.
local function holds(job, unit, epoch, owner)
  local lease = redis.call('HMGET', unit_key(job, unit), 'epoch', 'owner', 'state')
  return lease[1] == epoch and lease[2] == owner and lease[3] == 'leased'
end

-- The job's items take no more room: its quota, its shards, its bitmaps and what is left of it in the count of all.
local function let_go(job)
  local key = job_key(job)
  local state = redis.call('HMGET', key, 'shards', 'tenant', 'total', 'tokens', 'completed', 'failed')
  for _, back in ipairs({{'jobs', 1}, {'items', state[3]}, {'tokens', state[4] or 0}}) do
    local left = tonumber(redis.call('HGET', bulk_key(state[2]), back[1]) or 0) - back[2]
    if left > 0 then redis.call('HSET', bulk_key(state[2]), back[1], int(left)) else redis.call('HDEL', bulk_key(state[2]), back[1]) end
  end
  redis.call('HINCRBY', BULK, 'queued', tonumber(state[5]) + tonumber(state[6]) - tonumber(state[3]))
  for shard = 0, tonumber(state[1]) - 1 do
    withdraw(job, shard)
    redis.call('ZREM', LEASES, member(job, shard))
    redis.call('DEL', unit_key(job, shard))
  end
  withdraw(job, FINAL)
  redis.call('ZREM', LEASES, member(job, FINAL))
  redis.call('ZREM', DEADLINES, job)
  redis.call('DEL', unit_key(job, FINAL), done_key(job), failed_key(job))
end

local function over(job, status, at)
  local key = job_key(job)
  redis.call('HSET', key, 'status', status, status .. '_at', int(at))
  local state = redis.call('HMGET', key, 'tenant', 'webhook')
  redis.call('ZADD', FINISHED, int(at), state[1] .. '/' .. job)
  return state[1] .. '/' .. job, state[2]
end

local function forget(job, tenant)
  local key = job_key(job)
  local digest = redis.call('HGET', key, 'idempotency')
  if digest and redis.call('HGET', idempotency_key(tenant), digest) == job then redis.call('HDEL', idempotency_key(tenant), digest) end
  redis.call('DEL', key)
  redis.call('ZREM', jobs_key(tenant), job)
  redis.call('ZREM', batches_key(tenant), job)
  redis.call('ZREM', FINISHED, tenant .. '/' .. job)
  redis.call('ZREM', OUTBOX, tenant .. '/' .. job)
end

-- Enter a job and its shards, if its tenant's bulk quota has room. Start tags are virtual times (items served), so that
-- tenants share fairly.
-- ARGV: job, tenant, lane, items, shard size, deadline (ms, 0 = none), account (whose usage it is), tokens that it may take,
--       most active jobs, items and tokens of the tenant (0 = no limit), 1 to only ask whether there is room,
--       then field, value … of the job hash
-- Returns: 'entered', 'known' (it was there already), or 'jobs', 'items' or 'tokens' (that quota is full) and what is in use
local job, tenant, lane = ARGV[1], ARGV[2], ARGV[3]
local items, size, deadline, account, tokens = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8])
local key = job_key(job)
if redis.call('EXISTS', key) == 1 then return {'known', 0} end
local quota = bulk_key(tenant)
for i, need in ipairs({{'jobs', 1}, {'items', items}, {'tokens', tokens}}) do
  local most, used = tonumber(ARGV[8 + i]), tonumber(redis.call('HGET', quota, need[1]) or 0)
  if most > 0 and used + need[2] > most then
    count_usage(account, 'bulk_refused', 1)
    return {need[1], int(used)}
  end
end
if ARGV[12] == '1' then return {'room', 0} end
redis.call('HINCRBY', quota, 'jobs', 1)
redis.call('HINCRBY', quota, 'items', items)
redis.call('HINCRBY', quota, 'tokens', int(tokens))
local shards = math.ceil(items / size)
local now = int(now_ms())
redis.call('HSET', key, 'tenant', tenant, 'lane', lane, 'status', 'queued', 'total', items, 'completed', 0, 'failed', 0,
  'shards', shards, 'open_shards', shards, 'shard_size', size, 'created_at', now, 'input_tokens', 0, 'output_tokens', 0,
  'account', account, 'tokens', int(tokens))
for i = 13, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
local clock = tonumber(redis.call('GET', ROOT .. 'virtual:' .. lane) or 0)
local tags = ROOT .. 'virtual:' .. lane .. ':tenants'
local start = math.max(clock, tonumber(redis.call('HGET', tags, tenant) or 0))
for shard = 0, shards - 1 do
  local count = math.min(size, items - shard * size)
  redis.call('HSET', unit_key(job, shard), 'state', 'pending', 'epoch', 0, 'first', shard * size, 'count', count,
    'score', int(start), 'crashes', 0)
  redis.call('ZADD', pending_key(lane), start, member(job, shard))
  start = start + count
end
redis.call('HSET', tags, tenant, int(start))
redis.call('ZADD', ROOT .. 'tenant:' .. tenant .. ':jobs', now, job)
if deadline > 0 then redis.call('ZADD', DEADLINES, deadline, job) end
return {'entered', 0}

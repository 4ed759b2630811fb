-- Enter a job and its shards, if its tenant's bulk quota has room.
-- ARGV: 1 job, 2 tenant, 3 account (whose usage it is, and who shares fairly), 4 lane, 5 items, 6 shard size,
--       7 deadline (ms, 0 = none), 8 tokens that it may take, 9 priority, 10 items that may fail (-1 = all), 11 created (ms),
--       12 digest of its Idempotency-Key ('' = none), 13 digest of its request,
--       14-16 most active jobs, items and tokens of the tenant (0 = no limit),
--       17 'enter', 'ask' (only say whether there is room) or 'hold' (enter, but keep its shards from starting until `open`),
--       then field, value … of the job hash
-- Returns: what ('entered', 'known', 'conflict', 'room', or the quota that is full: 'jobs', 'items', 'tokens'), its use, job
local job, tenant, account, lane = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local items, size, tokens, mode = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[8]), ARGV[17]
local key = job_key(job)
if redis.call('EXISTS', key) == 1 then return {'known', 0, job} end
if ARGV[12] ~= '' then
  local earlier = redis.call('HGET', idempotency_key(tenant), ARGV[12])
  if earlier and redis.call('EXISTS', job_key(earlier)) == 1 then
    local same = redis.call('HGET', job_key(earlier), 'digest') == ARGV[13]
    return {same and 'known' or 'conflict', 0, earlier}
  end
end
local quota = bulk_key(tenant)
for i, need in ipairs({{'jobs', 1}, {'items', items}, {'tokens', tokens}}) do
  local most, used = tonumber(ARGV[13 + i]), tonumber(redis.call('HGET', quota, need[1]) or 0)
  if most > 0 and used + need[2] > most then
    count_usage(account, 'bulk_refused', 1)
    return {need[1], int(used), job}
  end
end
if mode == 'ask' then return {'room', 0, job} end
redis.call('HINCRBY', quota, 'jobs', 1)
redis.call('HINCRBY', quota, 'items', items)
redis.call('HINCRBY', quota, 'tokens', int(tokens))
redis.call('HINCRBY', BULK, 'queued', items)
local shards = math.ceil(items / size)
redis.call('HSET', key, 'tenant', tenant, 'account', account, 'lane', lane, 'status', 'queued', 'total', items, 'completed', 0,
  'failed', 0, 'shards', shards, 'open_shards', shards, 'shard_size', size, 'created_at', ARGV[11], 'input_tokens', 0,
  'output_tokens', 0, 'tokens', int(tokens), 'most_failed', ARGV[10])
for i = 18, #ARGV, 2 do describe(job, ARGV[i], ARGV[i + 1]) end
if ARGV[12] ~= '' then
  redis.call('HSET', key, 'idempotency', ARGV[12], 'digest', ARGV[13])
  redis.call('HSET', idempotency_key(tenant), ARGV[12], job)
end
list_job(tenant, job, ARGV[11])
if tonumber(ARGV[7]) > 0 then redis.call('ZADD', DEADLINES, ARGV[7], job) end
if mode == 'hold' then redis.call('HSET', key, 'held', 1) end
-- Units of one account: a higher priority first, then the earlier job, then its shards in order. 8 + 32 + 13 bits.
local order = (100 - tonumber(ARGV[9])) * 2 ^ 45 + (redis.call('INCR', ROOT .. 'sequence') % 2 ^ 32) * 2 ^ 13
for shard = 0, shards - 1 do
  redis.call('HSET', unit_key(job, shard), 'state', 'held', 'lane', lane, 'epoch', 0, 'first', shard * size,
    'count', math.min(size, items - shard * size), 'score', int(order + shard), 'crashes', 0)
  if mode == 'enter' then push(job, shard) end
end
return {'entered', 0, job}

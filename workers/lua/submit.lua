-- Enter a job and its shards. Start tags are virtual times (items served), so that tenants share fairly.
-- ARGV: job, tenant, lane, items, shard size, deadline (ms, 0 = none), then field, value … of the job hash
-- Returns: 1 entered, 0 it was there already
local job, tenant, lane = ARGV[1], ARGV[2], ARGV[3]
local items, size, deadline = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local key = job_key(job)
if redis.call('EXISTS', key) == 1 then return 0 end
local shards = math.ceil(items / size)
local now = int(now_ms())
redis.call('HSET', key, 'tenant', tenant, 'lane', lane, 'status', 'queued', 'total', items, 'completed', 0, 'failed', 0,
  'shards', shards, 'open_shards', shards, 'shard_size', size, 'created_at', now, 'input_tokens', 0, 'output_tokens', 0)
for i = 7, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
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
return 1

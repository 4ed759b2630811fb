-- A held job is complete again: what is left of it may start.
-- ARGV: job, 1 if its owner had cancelled it
-- Returns: 1 opened, 0 it was not held
local job, key = ARGV[1], job_key(ARGV[1])
if redis.call('HDEL', key, 'held') == 0 then return 0 end
local state = redis.call('HMGET', key, 'shards', 'completed', 'failed')
if tonumber(state[2]) + tonumber(state[3]) > 0 then
  redis.call('HSET', key, 'status', 'in_progress', 'in_progress_at', redis.call('HGET', key, 'created_at'))
end
for shard = 0, tonumber(state[1]) - 1 do
  local unit = redis.call('HMGET', unit_key(job, shard), 'finished', 'count')
  if tonumber(unit[1] or 0) >= tonumber(unit[2]) then close_shard(job, shard) else push(job, shard) end
end
if redis.call('HDEL', key, 'wish') == 1 or ARGV[2] == '1' then stop_job(job, 'cancelling') end
return 1

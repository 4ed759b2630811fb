-- The result files are in place: the job is over. Its shards and bitmaps are no longer needed.
-- ARGV: job, epoch, owner
-- Returns: the terminal status, or 'stale' if someone else is finalizing
local job = ARGV[1]
local key = job_key(job)
local state = redis.call('HMGET', key, 'status', 'outcome', 'shards', 'tenant', 'total', 'tokens')
if state[1] ~= 'finalizing' then return state[1] or 'stale' end
if not holds(job, FINAL, ARGV[2], ARGV[3]) then
  redis.call('INCR', ROOT .. 'stale_commits')
  return 'stale'
end
redis.call('HSET', key, 'status', state[2], state[2] .. '_at', int(now_ms()))
redis.call('ZREM', LEASES, member(job, FINAL))
for _, back in ipairs({{'jobs', 1}, {'items', state[5]}, {'tokens', state[6] or 0}}) do
  local left = tonumber(redis.call('HGET', bulk_key(state[4]), back[1]) or 0) - back[2]
  if left > 0 then redis.call('HSET', bulk_key(state[4]), back[1], int(left)) else redis.call('HDEL', bulk_key(state[4]), back[1]) end
end
for shard = 0, tonumber(state[3]) - 1 do redis.call('DEL', unit_key(job, shard)) end
redis.call('DEL', unit_key(job, FINAL), done_key(job), failed_key(job))
return state[2]

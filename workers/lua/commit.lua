-- Make finished items count, and renew the lease; with no items it only renews.
-- ARGV: job, unit, epoch, owner, lease (ms), segment name, its durable length (bytes), input tokens, output tokens,
--       number of completed items, those items …, the failed items …
-- Returns: 'stale' (someone else has the unit: nothing was changed), 'go', 'stop' (job is stopping), 'closed' (unit done)
local job, unit, epoch, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local segment, length = 'segment:' .. ARGV[6], tonumber(ARGV[7])
if not holds(job, unit, epoch, owner) then
  -- The replay of the commit that closed the unit is no stale one.
  local key = unit_key(job, unit)
  if redis.call('HGET', key, 'epoch') == epoch and redis.call('HGET', key, 'state') == 'closed'
    and tonumber(redis.call('HGET', key, segment) or -1) >= length then return 'closed' end
  redis.call('INCR', ROOT .. 'stale_commits')
  return 'stale'
end
redis.call('ZADD', LEASES, now_ms() + tonumber(ARGV[5]), member(job, unit))
local key, completed = unit_key(job, unit), tonumber(ARGV[10])
if length > tonumber(redis.call('HGET', key, segment) or 0) then
  local new = 0
  redis.call('HSET', key, segment, int(length), 'progress', 1, 'crashes', 0)
  for i = 11, #ARGV do
    if redis.call('SETBIT', done_key(job), ARGV[i], 1) == 0 then
      local field = 'completed'
      new = new + 1
      if i > 10 + completed then
        field = 'failed'
        redis.call('SETBIT', failed_key(job), ARGV[i], 1)
      end
      redis.call('HINCRBY', job_key(job), field, 1)
      redis.call('HINCRBY', key, 'finished', 1)
    end
  end
  redis.call('HINCRBY', job_key(job), 'input_tokens', ARGV[8])
  redis.call('HINCRBY', job_key(job), 'output_tokens', ARGV[9])
  count_usage(redis.call('HGET', job_key(job), 'account') or 'none', 'bulk_requests', new, 'bulk_input_tokens', ARGV[8],
    'bulk_output_tokens', ARGV[9])
end
local lead = redis.call('HMGET', key, 'finished', 'count')
if unit ~= FINAL and tonumber(lead[1] or 0) >= tonumber(lead[2]) then
  close_shard(job, unit)
  return 'closed'
end
if unit ~= FINAL and stopping(redis.call('HGET', job_key(job), 'status')) then return 'stop' end
return 'go'

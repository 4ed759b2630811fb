-- Make finished items count, and renew the lease; with no items it only renews.
-- ARGV: job, unit, epoch, owner, lease (ms), segment name, its durable length (bytes), input tokens, output tokens,
--       number of completed items, those items …, the failed items …
-- Returns: 'stale' (someone else has the unit: nothing was changed), 'go', 'stop' (job is stopping), 'closed' (unit done)
local job, unit, epoch, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local segment, length = 'segment:' .. ARGV[6], tonumber(ARGV[7])
local key = unit_key(job, unit)
if not holds(job, unit, epoch, owner) then
  -- The replay of the commit that closed the unit is no stale one.
  if redis.call('HGET', key, 'epoch') == epoch and redis.call('HGET', key, 'state') == 'closed'
    and tonumber(redis.call('HGET', key, segment) or -1) >= length then return 'closed' end
  redis.call('INCR', ROOT .. 'stale_commits')
  return 'stale'
end
redis.call('ZADD', LEASES, now_ms() + tonumber(ARGV[5]), member(job, unit))
if length > tonumber(redis.call('HGET', key, segment) or 0) then
  local items = {}
  for i = 11, #ARGV do
    items[#items + 1] = ARGV[i]
    redis.call('HDEL', key, 'deaths:' .. ARGV[i])
  end
  redis.call('HSET', key, 'progress', 1, 'crashes', 0)
  local new = count_items(job, unit, ARGV[6], length, items, tonumber(ARGV[10]) + 1)
  local about = redis.call('HMGET', job_key(job), 'account', 'failed', 'most_failed')
  redis.call('HINCRBY', job_key(job), 'input_tokens', ARGV[8])
  redis.call('HINCRBY', job_key(job), 'output_tokens', ARGV[9])
  count_usage(about[1], 'bulk_requests', new, 'bulk_input_tokens', ARGV[8], 'bulk_output_tokens', ARGV[9])
  count_recent(job_key(job), new)
  count_recent(BULK, new)
  if tonumber(about[3]) >= 0 and tonumber(about[2]) > tonumber(about[3]) then stop_job(job, 'failing') end
end
local lead = redis.call('HMGET', key, 'finished', 'count')
if unit ~= FINAL and tonumber(lead[1] or 0) >= tonumber(lead[2]) then
  close_shard(job, unit)
  return 'closed'
end
if unit ~= FINAL and stopping(redis.call('HGET', job_key(job), 'status')) then return 'stop' end
return 'go'

-- The result files are in place: the job is over. Its shards and bitmaps are no longer needed.
-- ARGV: job, epoch, owner, status, completed items, failed items
-- Returns: the terminal status, or 'stale' if someone else is finalizing
local job, key = ARGV[1], job_key(ARGV[1])
local status = redis.call('HGET', key, 'status')
if status ~= 'finalizing' then return status or 'stale' end
if not holds(job, FINAL, ARGV[2], ARGV[3]) then
  redis.call('INCR', ROOT .. 'stale_commits')
  return 'stale'
end
let_go(job)
redis.call('HSET', key, 'completed', ARGV[5], 'failed', ARGV[6])
redis.call('HDEL', key, 'recent', 'recent_at', 'recent_since', 'outcome', 'open_shards')
local entry, webhook = over(job, ARGV[4], now_ms())
if webhook then redis.call('ZADD', OUTBOX, int(now_ms()), entry) end
return ARGV[4]

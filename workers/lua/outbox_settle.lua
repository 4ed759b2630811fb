-- What became of a delivery. Of two senders of one entry the first to settle it for good decides, except that delivered
-- is delivered.
-- ARGV: 1 entry (tenant/job), 2 delivered, failed (given up) or pending, 3 how often it was sent,
--       4 why it was not delivered ('' = it was), 5 ms after which it is due again (pending)
-- Returns: 1, or 0 if the entry was settled before or its job is gone
local entry, status = ARGV[1], ARGV[2]
local key = job_key(string.match(entry, '^.-/(.+)$'))
local waits = redis.call('ZSCORE', OUTBOX, entry)
if redis.call('EXISTS', key) == 0 then
  redis.call('ZREM', OUTBOX, entry)
  return 0
end
if not waits and status ~= 'delivered' then return 0 end
if status == 'pending' then
  redis.call('ZADD', OUTBOX, int(now_ms() + tonumber(ARGV[5])), entry)
else
  redis.call('ZREM', OUTBOX, entry)
  if status == 'failed' then redis.call('INCR', ROOT .. 'webhooks_failed') end
end
redis.call('HSET', key, 'webhook_status', status, 'webhook_attempts', ARGV[3])
if ARGV[4] == '' then redis.call('HDEL', key, 'webhook_error') else redis.call('HSET', key, 'webhook_error', ARGV[4]) end
return 1

-- Heartbeat of a worker, and the number of live ones.
-- ARGV: name (empty: only count), seconds until it counts as gone (0: it leaves now)
-- Returns: live workers
local key, now = ROOT .. 'workers', now_ms()
if ARGV[1] ~= '' then
  if tonumber(ARGV[2]) > 0 then redis.call('ZADD', key, now + tonumber(ARGV[2]) * 1000, ARGV[1])
  else redis.call('ZREM', key, ARGV[1]) end
end
redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. now)
return redis.call('ZCARD', key)

-- Heartbeat of a worker: that it lives, what it has at the engine, and what it had to give back. And how many live.
-- What it gave back comes as its sum since the worker began, and its growth is added up: a replay adds nothing.
-- ARGV: name (empty: only count), seconds until it counts as gone (0: it leaves now), its lane, its requests at the
--       engine, its requests that were given back, ms of execution that this wasted
-- Returns: live workers
local key, now = ROOT .. 'workers', now_ms()
if ARGV[1] ~= '' then
  local own = ROOT .. 'worker:' .. ARGV[1]
  if tonumber(ARGV[2]) > 0 then redis.call('ZADD', key, now + tonumber(ARGV[2]) * 1000, ARGV[1])
  else redis.call('ZREM', key, ARGV[1]) end
  for field, sum in pairs({given_back = ARGV[5], wasted_ms = ARGV[6]}) do
    local growth = tonumber(sum) - tonumber(redis.call('HGET', own, field) or 0)
    if growth > 0 then redis.call('HINCRBY', BULK, field, int(growth)) end
  end
  redis.call('HSET', own, 'lane', ARGV[3], 'at', int(now), 'in_flight', ARGV[4], 'given_back', ARGV[5], 'wasted_ms', ARGV[6])
  redis.call('EXPIRE', own, 86400)
end
redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. now)
return redis.call('ZCARD', key)

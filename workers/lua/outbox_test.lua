-- Whether an API key may send one more test event now. A replay counts once.
-- ARGV: key id, id of the request, most tests, in so many ms
-- Returns: 0 it may, else ms until it may
local key, now = ROOT .. 'webhook_tests:' .. ARGV[1], now_ms()
redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now - ARGV[4]))
if redis.call('ZSCORE', key, ARGV[2]) then return 0 end
if redis.call('ZCARD', key) >= tonumber(ARGV[3]) then
  local oldest = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return math.max(1, oldest[2] + ARGV[4] - now)
end
redis.call('ZADD', key, int(now), ARGV[2])
redis.call('PEXPIRE', key, ARGV[4])
return 0

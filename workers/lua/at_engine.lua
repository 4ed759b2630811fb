-- What bulk work is at the engine now, as the workers said lately.
-- ARGV: lane whose workers are counted, ms after which what a worker has at the engine is no longer believed
-- Returns: live workers of that lane, requests at the engine (of all lanes)
local now, workers, in_flight = now_ms(), 0, 0
for _, name in ipairs(redis.call('ZRANGEBYSCORE', ROOT .. 'workers', int(now), '+inf')) do
  local said = redis.call('HMGET', ROOT .. 'worker:' .. name, 'lane', 'at', 'in_flight')
  if said[1] == ARGV[1] then workers = workers + 1 end
  if said[2] and tonumber(said[2]) >= now - tonumber(ARGV[2]) then in_flight = in_flight + tonumber(said[3]) end
end
return {workers, in_flight}

-- Admit one request of a key by its requests per minute (GCRA: one integer, the theoretical arrival time in µs).
-- KEYS: the key's arrival time    ARGV: requests per minute
-- Returns: admitted (1 or 0), requests left now, µs until all are left again, µs until one more is admitted
local interval = 60000000 / tonumber(ARGV[1])
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local arrival = math.max(now, math.min(tonumber(redis.call('GET', KEYS[1]) or 0), now + 60000000))
local next_arrival = arrival + interval
local late = next_arrival - now - 60000000
if late > 0.5 then
  return {0, 0, math.ceil(arrival - now), math.ceil(late)}
end
redis.call('SET', KEYS[1], string.format('%.0f', next_arrival), 'PX', math.ceil((next_arrival - now) / 1000) + 1)
return {1, math.floor((now + 60000000 - next_arrival + 0.5) / interval), math.ceil(next_arrival - now), 0}

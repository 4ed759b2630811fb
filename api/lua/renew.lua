-- An api process says that it and its requests live, and that it records them here. What it stops renewing is free for
-- others when the lease is over. Bulk workers look at when a process last said so (workers/lua/people.lua).
-- ARGV: process, lease (µs), number of requests, then per request: request, key id, 'leased' or 'waiting';
--       then per key in use: key id, version of its record as the process knows it
-- Returns: api processes that live, then the ids of keys whose record has changed
local process, lease, requests = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_us()
local processes = ROOT .. 'apis' -- sorted set: when each said so last (µs)
redis.call('ZADD', processes, int(now), process)
redis.call('ZREMRANGEBYSCORE', processes, '-inf', int(now - lease))
local at = 4
for _ = 1, requests do
  local request, key, state = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  at = at + 3
  if state == 'leased' then
    hold_lease(key, request, now, lease)
    hold_lease(ALL, request, now, lease)
  elseif redis.call('ZSCORE', waiting_key(key), request) then
    hold_place(key, request, now, lease)
  end
end
local answer = {redis.call('ZCARD', processes)}
for i = at, #ARGV, 2 do
  if redis.call('HGET', ROOT .. 'key:' .. ARGV[i], 'version') ~= ARGV[i + 1] then table.insert(answer, ARGV[i]) end
end
return answer

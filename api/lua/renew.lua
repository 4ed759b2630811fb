-- An api process says that it and its requests live, and that it records them here. What it stops renewing is free for
-- others when the lease is over. Bulk workers look at when a process last said so (workers/lua/people.lua).
-- ARGV: process, lease (µs), number of requests, then per request: request, key id, 'leased' or 'waiting';
--       then per key in use: key id, version of its record as the process knows it
-- Returns: api processes that live, then the ids of keys whose record has changed
local process, lease, requests = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_us()
local processes = ROOT .. 'apis' -- sorted set: when each said so last (µs)
call('ZADD', processes, int(now), process)
call('ZREMRANGEBYSCORE', processes, '-inf', int(now - lease))
local over, keep = int(now + lease), int(lease / 1000 + 1000)
local at = 4
for _ = 1, requests do
  local request, key, state = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  at = at + 3
  if state == 'leased' then
    hold_lease(limit_key(key) .. ':leases', request, over, keep)
    hold_lease(limit_key(ALL) .. ':leases', request, over, keep)
  elseif call('ZSCORE', limit_key(key) .. ':waiting', request) then
    hold_place(limit_key(key), request, over, keep)
  end
end
local answer = {call('ZCARD', processes)}
for i = at, #ARGV, 2 do
  if call('HGET', ROOT .. 'key:' .. ARGV[i], 'version') ~= ARGV[i + 1] then table.insert(answer, ARGV[i]) end
end
return answer

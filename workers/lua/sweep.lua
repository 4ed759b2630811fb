-- Expired leases go back to pending; jobs past their deadline stop.
-- ARGV: most units to take back in one call
-- Returns: units taken back, jobs that expired, then lane, pending units … of every lane
local now = now_ms()
local back = redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, tonumber(ARGV[1]))
for _, entry in ipairs(back) do
  local job, unit = string.match(entry, '^(.-)/(.+)$')
  local state = redis.call('HMGET', unit_key(job, unit), 'state', 'progress')
  if state[1] == 'leased' then
    give_back(job, unit, state[2] == '0')
  else
    redis.call('ZREM', LEASES, entry)
  end
end
local late = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now)
for _, job in ipairs(late) do
  if stop_job(job, 'expiring') == 0 and redis.call('HGET', job_key(job), 'held') ~= '1' then redis.call('ZREM', DEADLINES, job) end
end
local answer = {#back, #late}
for _, value in ipairs(redis.call('HGETALL', ROOT .. 'pending')) do answer[#answer + 1] = value end
return answer

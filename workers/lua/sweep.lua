-- Expired leases go back to pending; jobs past their deadline stop.
-- ARGV: lane, most units to take back in one call
-- Returns: units taken back, jobs that expired, units pending in the lane and of the finalizer
local now = now_ms()
local back = redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, tonumber(ARGV[2]))
for _, entry in ipairs(back) do
  local job, unit = string.match(entry, '^(.-)/(.+)$')
  local key = unit_key(job, unit)
  if redis.call('HGET', key, 'state') == 'leased' then
    if redis.call('HGET', key, 'progress') == '0' then redis.call('HINCRBY', key, 'crashes', 1) end
    give_back(job, unit)
  else
    redis.call('ZREM', LEASES, entry)
  end
end
local late = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now)
for _, job in ipairs(late) do stop_job(job, 'expiring') end
return {#back, #late, redis.call('ZCARD', pending_key(ARGV[1])) + redis.call('ZCARD', pending_key(FINAL))}

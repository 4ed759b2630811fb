-- Lease what is due in the outbox, the oldest first, of one host and of one tenant no more than may be sent at a time.
-- A lease is a later due time and nothing else: an entry whose sender died is due again when it is over. Entries of jobs
-- that are gone are dropped. A replay leases others; those of the lost answer are due again when their lease is over.
-- ARGV: 1 most entries, 2 lease (ms), 3 most of one host, 4 most of one tenant,
--       then who (as returned here) and how many of theirs are being sent, …
-- Returns: for each entry: itself (tenant/job), its host, its tenant, its address, how often it was sent
local SCAN, FRONT = 500, 100 -- entries looked at in one call, and how many of them keep their place in any case
local most, lease, now, busy, taken = tonumber(ARGV[1]), tonumber(ARGV[2]), now_ms(), {}, {}
for i = 5, #ARGV, 2 do busy[ARGV[i]] = tonumber(ARGV[i + 1]) end
local due = redis.call('ZRANGEBYSCORE', OUTBOX, '-inf', int(now), 'LIMIT', 0, SCAN)
for place, entry in ipairs(due) do
  if #taken == most then break end
  local tenant, job = string.match(entry, '^(.-)/(.+)$')
  local state = redis.call('HMGET', job_key(job or ''), 'tenant', 'webhook', 'webhook_attempts')
  if not state[2] or state[1] ~= tenant then
    redis.call('ZREM', OUTBOX, entry)
  else
    local host = '//' .. string.lower(string.match(state[2], '^%w+://([^/?#]+)') or '')
    if (busy[host] or 0) < tonumber(ARGV[3]) and (busy[tenant] or 0) < tonumber(ARGV[4]) then
      busy[host], busy[tenant] = (busy[host] or 0) + 1, (busy[tenant] or 0) + 1
      redis.call('ZADD', OUTBOX, int(now + lease), entry)
      taken[#taken + 1] = {entry, host, tenant, state[2], state[3] or '0'}
    elseif #due == SCAN and place > FRONT then -- so many wait for the same that others could stand behind them
      redis.call('ZADD', OUTBOX, int(now + 1000), entry)
    end
  end
end
return taken

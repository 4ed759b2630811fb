-- Give a leased unit back unfinished: at once to be claimed by another, or closed if its job is stopping.
-- ARGV: job, unit, epoch, owner, how: 'idle' (nothing was wrong), 'crashed' (it ended in a fault), 'cured' (what crashed is known)
-- Returns: 1 given back, 0 it was not this owner's any more
local job, unit, how = ARGV[1], ARGV[2], ARGV[5]
if not holds(job, unit, ARGV[3], ARGV[4]) then return 0 end
local key = unit_key(job, unit)
redis.call('DEL', ROOT .. 'claim:' .. ARGV[4])
local current = redis.call('HGET', key, 'current')
redis.call('HDEL', key, 'current')
if how == 'idle' and current then
  local item = 'deaths:' .. string.match(current, ':(.+)$')
  if redis.call('HEXISTS', key, item) == 1 then redis.call('HINCRBY', key, item, -1) end
end
if how == 'cured' and unit ~= FINAL then redis.call('HSET', key, 'lane', redis.call('HGET', job_key(job), 'lane'), 'crashes', 0) end
give_back(job, unit, how == 'crashed')
return 1

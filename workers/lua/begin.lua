-- In quarantine: an item is about to run, alone. What is written down here before it outlives the worker that it kills.
-- ARGV: job, unit, epoch, owner, item
-- Returns: -1 the lease is lost, else how often the item was begun before and its worker never came back from it
local job, unit = ARGV[1], ARGV[2]
if not holds(job, unit, ARGV[3], ARGV[4]) then return -1 end
local key, mark = unit_key(job, unit), ARGV[3] .. ':' .. ARGV[5]
if redis.call('HGET', key, 'current') == mark then return redis.call('HGET', key, 'deaths:' .. ARGV[5]) - 1 end
redis.call('HSET', key, 'current', mark)
return redis.call('HINCRBY', key, 'deaths:' .. ARGV[5], 1) - 1

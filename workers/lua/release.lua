-- Give a leased unit back unfinished: at once to be claimed by another, or closed if its job is stopping.
-- ARGV: job, unit, epoch, owner
-- Returns: 1 given back, 0 it was not this owner's any more
local job, unit = ARGV[1], ARGV[2]
if not holds(job, unit, ARGV[3], ARGV[4]) then return 0 end
redis.call('DEL', ROOT .. 'claim:' .. ARGV[4])
give_back(job, unit)
return 1

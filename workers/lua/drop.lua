-- Forget a held job whose files are gone.
-- ARGV: job, tenant
-- Returns: 1, or 0 if it was not held
local job, tenant, key = ARGV[1], ARGV[2], job_key(ARGV[1])
if redis.call('HGET', key, 'held') ~= '1' then return 0 end
let_go(job)
forget(job, tenant)
return 1

-- Forget a job that is over.
-- ARGV: job, tenant
-- Returns: 'gone' (it is forgotten, or was not there), or the status of one that is not over
local job, tenant, key = ARGV[1], ARGV[2], job_key(ARGV[1])
local status = redis.call('HGET', key, 'status')
local terminal = {completed = 1, cancelled = 1, expired = 1, failed = 1}
if status and not terminal[status] then return status end
forget(job, tenant)
return 'gone'

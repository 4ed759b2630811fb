-- Enter a job that is over: one that the disk knows as finished, or a batch that never began.
-- ARGV: 1 job, 2 tenant, 3 status, 4 when (ms), 5 total, 6 completed, 7 failed, 8 created (ms), 9 digest of its
--       Idempotency-Key ('' = none), 10 1 if its webhook was not delivered, then field, value … of the job hash
-- Returns: 1
local job, tenant, key = ARGV[1], ARGV[2], job_key(ARGV[1])
if redis.call('EXISTS', key) == 1 then
  if redis.call('ZSCORE', FINISHED, tenant .. '/' .. job) then return 1 end
  let_go(job)
end
redis.call('HSET', key, 'tenant', tenant, 'total', ARGV[5], 'completed', ARGV[6], 'failed', ARGV[7], 'created_at', ARGV[8])
for i = 11, #ARGV, 2 do describe(job, ARGV[i], ARGV[i + 1]) end
redis.call('HDEL', key, 'held')
list_job(tenant, job, ARGV[8])
if ARGV[9] ~= '' then redis.call('HSET', idempotency_key(tenant), ARGV[9], job) end
local entry = over(job, ARGV[3], ARGV[4])
if ARGV[10] == '1' then redis.call('ZADD', OUTBOX, int(now_ms()), entry) end
return 1

-- Forget a job that is over.
-- ARGV: job, tenant
-- Returns: 'gone' (it is forgotten, or was not there), or the status of one that is not over
local job, tenant, key = ARGV[1], ARGV[2], job_key(ARGV[1])
local state = redis.call('HMGET', key, 'status', 'idempotency')
local terminal = {completed = 1, cancelled = 1, expired = 1, failed = 1}
if state[1] and not terminal[state[1]] then return state[1] end
if state[2] then redis.call('HDEL', idempotency_key(tenant), state[2]) end
redis.call('DEL', key)
redis.call('ZREM', jobs_key(tenant), job)
redis.call('ZREM', batches_key(tenant), job)
redis.call('ZREM', FINISHED, tenant .. '/' .. job)
redis.call('ZREM', OUTBOX, tenant .. '/' .. job)
return 'gone'

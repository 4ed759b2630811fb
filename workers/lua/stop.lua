-- Cancel a job on its owner's wish.
-- ARGV: job
-- Returns: 1 it is being cancelled now, 0 it was already stopping or over
local key = job_key(ARGV[1])
if redis.call('HGET', key, 'held') == '1' then return redis.call('HSET', key, 'wish', 1) end -- `open` heeds it
return stop_job(ARGV[1], 'cancelling')

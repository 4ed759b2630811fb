-- Cancel a job on its owner's wish.
-- ARGV: job
-- Returns: 1 it is being cancelled now, 0 it was already stopping or over
return stop_job(ARGV[1], 'cancelling')

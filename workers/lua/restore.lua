-- Results that the disk has of a held job's shard count again.
-- ARGV: job, shard, segment, its valid length (bytes), input tokens, output tokens, number of completed items, those …, failed …
-- Returns: how many of them were not known
local job, unit = ARGV[1], ARGV[2]
if redis.call('HGET', job_key(job), 'held') ~= '1' then return 0 end
-- Later leases sort behind those that the disk has: events count positions in that order.
local epoch = tonumber(string.match(ARGV[3], '^%d+%.(%d+)%.'))
if epoch > tonumber(redis.call('HGET', unit_key(job, unit), 'epoch') or 0) then redis.call('HSET', unit_key(job, unit), 'epoch', epoch) end
local items = {}
for i = 8, #ARGV do items[#items + 1] = ARGV[i] end
local new = count_items(job, unit, ARGV[3], ARGV[4], items, tonumber(ARGV[7]) + 1)
if new > 0 then
  redis.call('HINCRBY', job_key(job), 'input_tokens', ARGV[5])
  redis.call('HINCRBY', job_key(job), 'output_tokens', ARGV[6])
end
return new

-- Enter a key's record, unless a newer one is there: changes may arrive here in any order.
-- ARGV: key id, record (JSON), its version
-- Returns: 1 entered, 0 there is a newer one
local key = ROOT .. 'key:' .. ARGV[1]
if tonumber(call('HGET', key, 'version') or 0) > tonumber(ARGV[3]) then return 0 end
call('HSET', key, 'record', ARGV[2], 'version', ARGV[3])
return 1

-- Interactive work, as the api's processes record it (api/lua/admit.lua, renew.lua).
-- Returns: requests that hold a slot now (those that wait for one don't count), ms since an api process last said that
--          it records them (-1: none has)
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local newest = redis.call('ZRANGE', ROOT .. 'apis', -1, -1, 'WITHSCORES')
local silence = newest[2] and math.max(0, math.floor((now - tonumber(newest[2])) / 1000)) or -1
return {redis.call('ZCOUNT', ROOT .. 'limit:all:leases', '(' .. int(now), '+inf'), silence}

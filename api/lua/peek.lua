-- How a key stands now; nothing is changed.
-- ARGV: key id, its rpm, burst, tpm (0 = no limit)
-- Returns: requests left, µs until all are, tokens left, µs until all are (-1, 0 where there is no limit)
local now = now_us()
local own = buckets(ARGV[1], now, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), 0, 0)
local requests, requests_reset = left(own.requests, own.requests.before or now, now)
local tokens, tokens_reset = left(own.tokens, own.tokens.before or now, now)
return {requests, requests_reset, tokens, tokens_reset}

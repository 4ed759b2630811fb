-- How a key stands now; nothing is changed.
-- ARGV: key id, its rpm, burst, tpm (0 = no limit)
-- Returns: requests left, µs until all are, tokens left, µs until all are (-1, 0 where there is no limit)
local now = now_us()
local rpm, burst, tpm = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local of_requests, of_tokens = buckets(limit_key(ARGV[1]), now, rpm, burst, tpm, 0, 0)
local requests, requests_reset = left(of_requests, of_requests.before, now)
local tokens, tokens_reset = left(of_tokens, of_tokens.before, now)
return {requests, requests_reset, tokens, tokens_reset}

-- Resets a counter. KEYS: the counter; the key that says when it was reset, until all leases and holds of before have ended.
-- ARGV: for how many ms a lease can last.
redis.call('UNLINK', KEYS[1])
local done, left = pcall(redis.call, 'PTTL', KEYS[1] .. '.holds')
local known = tonumber(ARGV[1])
redis.call('SET', KEYS[2], string.format('%.0f', now), 'PX', done and math.max(known, left) or known)

-- Says that an instance lives, and learns how many do and whether a counter was reset by any of them.
-- KEYS: the instances by the moment of their last beat; the number of resets. ARGV: the instance, after how many ms it counts as gone.
local gone = tonumber(ARGV[2])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - gone * 1000)
redis.call('PEXPIRE', KEYS[1], gone)
return {redis.call('ZCARD', KEYS[1]), tonumber(redis.call('GET', KEYS[2]) or 0), now}

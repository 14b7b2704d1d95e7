-- Says that an instance lives, and learns how many do, whether a counter was reset by any of them, and how many do not know leases.
-- KEYS: the instances by the moment of their last beat; the number of resets; the instances that know leases, as the first.
-- ARGV: the instance, after how many ms it counts as gone.
local gone = tonumber(ARGV[2])
for _, key in ipairs({KEYS[1], KEYS[3]}) do
  redis.call('ZADD', key, now, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - gone * 1000)
  redis.call('PEXPIRE', key, gone)
end
local count = redis.call('ZCARD', KEYS[1])
return {count, tonumber(redis.call('GET', KEYS[2]) or 0), now, math.max(count - redis.call('ZCARD', KEYS[3]), 0)}

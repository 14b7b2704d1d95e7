-- Resets a counter. KEYS: the counter; the key that says when it was reset, until all leases of before have ended. ARGV: for how many ms.
redis.call('UNLINK', KEYS[1])
redis.call('SET', KEYS[2], string.format('%.0f', now), 'PX', ARGV[1])

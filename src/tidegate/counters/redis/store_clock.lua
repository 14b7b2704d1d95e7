-- The one clock: the store's own, microseconds since the epoch.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

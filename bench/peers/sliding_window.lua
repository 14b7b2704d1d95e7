-- A sliding window counter as it is commonly written by hand: the window before counts by the share of it still in sight.
-- KEYS[1] subject; ARGV[1] limit, ARGV[2] window in ms. Replies 1 when the check is admitted, 0 when it is denied.
local limit, window_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local window = math.floor(now_ms / window_ms)
local seen = redis.call('HMGET', KEYS[1], 'window', 'current', 'previous')
local last, current, previous = tonumber(seen[1] or window), tonumber(seen[2] or 0), tonumber(seen[3] or 0)
if last ~= window then
    previous = last == window - 1 and current or 0
    current = 0
end
if previous * (1 - now_ms % window_ms / window_ms) + current + 1 > limit then
    return 0
end
redis.call('HSET', KEYS[1], 'window', window, 'current', current + 1, 'previous', previous)
redis.call('PEXPIRE', KEYS[1], 2 * window_ms)
return 1

-- Moves the moment at which a hold expires. KEYS: its counters. ARGV: for each its record; then the id, and after how many microseconds
-- from now it expires. Answers 0 for an id that is not known, 1 for a hold that was renewed, 2 for one that has ended; the moment, and
-- the one before.
local id, ttl = ARGV[#KEYS + 1], tonumber(ARGV[#KEYS + 2])
local ends = nil
for k = 1, #KEYS do
  if ARGV[k] ~= '' then
    ends = ends or redis.call('ZSCORE', KEYS[k] .. '.holds', id .. ARGV[k])
  end
end
if not ends then
  return {redis.call('GET', ended_key(KEYS[1], id)) and 2 or 0, now}
elseif tonumber(ends) <= now then
  return {2, now}
end
local kept = math.ceil(ttl / 1000) + ENDED_KNOWN
for k = 1, #KEYS do
  local holds = KEYS[k] .. '.holds'
  if ARGV[k] ~= '' and redis.call('ZSCORE', holds, id .. ARGV[k]) then
    redis.call('ZADD', holds, string.format('%.0f', now + ttl), id .. ARGV[k])
    -- That the counter was reset must be known as long as the hold is.
    for _, key in ipairs({holds, KEYS[k] .. '.reset'}) do
      local left = redis.call('PTTL', key)
      if left >= 0 and left < kept then
        redis.call('PEXPIRE', key, kept)
      end
    end
  end
end
return {1, now + ttl, tonumber(ends)}

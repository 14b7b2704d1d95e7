-- Opens a hold: charges its cost as a check does, and remembers what it charged. KEYS and ARGV as in charge.lua; then in MessagePack the id,
-- after how many microseconds it expires, and how many holds a counter may have.
-- Answers as charge.lua does; then for each counter its record, empty where a soft limit let the cost pass uncharged. binding is 0 where a
-- counter has too many holds, and the next number says which counter.
local configs = {}
for k = 1, #KEYS do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
local cost = tonumber(ARGV[#KEYS + 1])
local id, ttl, most = unpack(cmsgpack.unpack(ARGV[#KEYS + 2]))
local functions, uncharged = hold_functions(), {}
algorithms.slots_wanted = 1
for k = 1, #KEYS do
  reclaim(KEYS[k], configs[k])
  if redis.call('ZCARD', KEYS[k] .. '.holds') >= most then
    return {0, k, 0, 0, now}
  end
  uncharged[k] = functions.is_uncharged(KEYS[k], configs[k], cost)
end
local answer = {decide(KEYS, configs, cost)}
if answer[1] < 0 then
  return answer
end
for k = 1, #KEYS do
  if uncharged[k] then
    answer[5 + k] = ''
  else
    local holds, record = KEYS[k] .. '.holds', functions.record_of(KEYS[k], configs[k], cost)
    redis.call('ZADD', holds, string.format('%.0f', now + ttl), id .. record)
    -- As long as the units count, a later settlement may give them back.
    local kept = math.max(redis.call('PTTL', KEYS[k]), math.ceil(ttl / 1000) + ENDED_KNOWN)
    if redis.call('PTTL', holds) < kept then
      redis.call('PEXPIRE', holds, kept)
    end
    answer[5 + k] = record
  end
end
return answer

-- Opens a hold: charges its cost as a check does, and remembers what it charged. KEYS and ARGV as in charge.lua; then the id, and in
-- MessagePack after how many microseconds it expires, and how many holds a counter may have.
-- Answers as charge.lua does, without `left`; then for each counter its record, empty where a soft limit let the cost pass uncharged; then
-- `left`, where it is wanted. binding is 0 where a counter has too many holds, and the next number says which counter.
local configs, open = {}, {}
for k = 1, #KEYS do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
local cost, id = tonumber(ARGV[#KEYS + 1]), ARGV[#KEYS + 2]
local ttl, most = unpack(cmsgpack.unpack(ARGV[#KEYS + 3]))
algorithms.slots_wanted = 1
for k = 1, #KEYS do
  local holds = KEYS[k] .. '.holds'
  open[k] = redis.call('ZCARD', holds)
  if open[k] > 0 and reclaim(KEYS[k], configs[k]) then
    open[k] = redis.call('ZCARD', holds)
  end
  if open[k] >= most then
    return {0, k, 0, 0, now}
  end
end
local answer = {decide(KEYS, configs, cost)}
if answer[1] < 0 then
  return answer
end
for k = 1, #KEYS do
  local algorithm, _, fresh, longest, uncharged = unpack(decided[k])
  if uncharged then
    answer[5 + k] = ''
  else
    local holds, record = KEYS[k] .. '.holds', {cost, now}
    if algorithm == algorithms.token_bucket and cost > 0 then
      hold_functions().bucket_levels(record, fresh, configs[k])
    end
    record = cmsgpack.pack(unpack(record))
    redis.call('ZADD', holds, string.format('%.0f', now + ttl), id .. record)
    -- As long as the units count, a later settlement may give them back. The state of a quota is kept for longer than it counts.
    local counts = cost > 0 and math.ceil(longest / 1000) or 0
    if algorithm == algorithms.quota then
      counts = redis.call('PTTL', KEYS[k])
    end
    local kept = math.max(counts, math.ceil(ttl / 1000) + ENDED_KNOWN)
    if open[k] == 0 or redis.call('PTTL', holds) < kept then
      redis.call('PEXPIRE', holds, kept)
    end
    answer[5 + k] = record
  end
end
answer[6 + #KEYS] = left
return answer

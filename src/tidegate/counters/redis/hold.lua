-- Opens a hold: charges its cost as a check does, and remembers what it charged. KEYS and ARGV as in charge.lua; then the id, and in
-- MessagePack after how many microseconds it expires, and how many holds a counter may have.
-- Answers as charge.lua does, without `left`; then for each counter its record, empty where a soft limit let the cost pass uncharged; then
-- `left`, where it is wanted. binding is 0 where a counter has too many holds, and the next number says which counter.
-- What goes before: hold_plain.lua.
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
  answer[5 + k] = uncharged and '' or file_hold(KEYS[k], algorithm, configs[k], fresh, longest, open[k])
end
answer[6 + #KEYS] = left
return answer

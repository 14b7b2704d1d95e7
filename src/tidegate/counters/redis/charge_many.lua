-- Checks that are asked together, each decided on its own, in order. KEYS: the counters of all, one check's after the other's.
-- ARGV[1]: for each check how many counters it has, its cost, and for each counter which of the following parameters are its.
-- ARGV[2], ...: algorithms and parameters. All in MessagePack. Answers five numbers a check; where one fails, for what its counters
-- hold or for what the user may not do, it has written nothing, its numbers are 0, and the others are decided. Where `left` is wanted,
-- that of each check follows after the numbers of all.
local plan = cmsgpack.unpack(ARGV[1])
local known, answers = {}, {}
local at, key, out, all_left = 1, 0, 0, {}
while at < #plan do
  local count, cost = plan[at], plan[at + 1]
  local keys, configs = {}, {}
  for k = 1, count do
    local which = plan[at + 1 + k]
    if not known[which] then
      known[which] = cmsgpack.unpack(ARGV[which])
    end
    keys[k], configs[k] = KEYS[key + k], known[which]
  end
  at, key = at + 2 + count, key + count
  local done, binding, least, reset, retry, at_us = pcall(decide, keys, configs, cost)
  if not done then
    binding, least, reset, retry, at_us = 0, 0, 0, 0, 0
  end
  answers[out + 1], answers[out + 2], answers[out + 3], answers[out + 4], answers[out + 5] = binding, least, reset, retry, at_us
  out = out + 5
  if left then
    all_left[#all_left + 1], left = done and left or {}, {}
  end
end
for i = 1, #all_left do
  answers[out + i] = all_left[i]
end
return answers

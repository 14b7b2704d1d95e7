-- Gives up leases, each on its own, in order. KEYS: the counters of all, one lease's after the other's, and after each counter the key that
-- says when it was reset. ARGV[1]: for each lease how many counters it has, the units leased, how many are unused, when they were charged,
-- when it ends, and for each counter which of the following parameters are its. ARGV[2], ...: algorithms and parameters. All in MessagePack.
-- A counter that was reset since does not contain the units any more. Answers for each lease how many counters took its units back.
local plan = cmsgpack.unpack(ARGV[1])
local known, answers = {}, {}
local at, key = 1, 0
while at < #plan do
  local count, units, unused, charged_at, ends = plan[at], plan[at + 1], plan[at + 2], plan[at + 3], plan[at + 4]
  local taken = 0
  for k = 1, count do
    local which = plan[at + 4 + k]
    if not known[which] then
      known[which] = cmsgpack.unpack(ARGV[which])
    end
    local reset_at = redis.call('GET', KEYS[key + 2 * k])
    if not reset_at or tonumber(reset_at) < charged_at then
      local done, changed = pcall(lease_give_back, KEYS[key + 2 * k - 1], known[which], now, units, unused, charged_at, ends)
      if done and changed then
        taken = taken + 1
      end
    end
  end
  answers[#answers + 1] = taken
  at, key = at + 5 + count, key + 2 * count
end
return answers

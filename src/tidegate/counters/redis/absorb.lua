-- Adds to counters what was admitted elsewhere while the store was out of reach, or takes back what another shard refused (costs
-- below 0). No limit is checked: it was admitted already.
-- KEYS: one counter each. ARGV: for each its algorithm and parameters as in charge.lua; then for each the states to add, an array with
-- one state or false for each window, in MessagePack. Answers how many counters were looked at.

for k = 1, #KEYS do
  local config = cmsgpack.unpack(ARGV[k])
  algorithms[config[1]].absorb(KEYS[k], config, cmsgpack.unpack(ARGV[#KEYS + k]), now)
end
return #KEYS

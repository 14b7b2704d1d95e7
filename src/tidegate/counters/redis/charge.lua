-- One check. KEYS: its counters. ARGV: for each its algorithm and parameters in MessagePack; then the cost.
local configs = {}
for k = 1, #KEYS do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
return {decide(KEYS, configs, tonumber(ARGV[#KEYS + 1]))}

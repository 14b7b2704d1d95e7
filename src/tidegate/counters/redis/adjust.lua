-- Charges units whatever the limits say, or gives some back. KEYS: the counters. ARGV: for each its algorithm and parameters as in charge.lua;
-- then the units, below 0 to give back. Answers as charge.lua answers a check of cost 0.
local give_back, configs = give_back_function(), {}
local units = tonumber(ARGV[#KEYS + 1])
for k = 1, #KEYS do
  configs[k] = cmsgpack.unpack(ARGV[k])
  reclaim(KEYS[k], configs[k])
  if units > 0 then
    charge_beyond(KEYS[k], configs[k], units)
  else
    refund(KEYS[k], configs[k], -units, give_back)
  end
end
return {decide(KEYS, configs, 0)}

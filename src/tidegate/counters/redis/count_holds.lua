-- How many holds of counters are open. KEYS: the counters. Answers a number for each; expired holds count until a script returns their units.
local counts = {}
for k = 1, #KEYS do
  counts[k] = redis.call('ZCARD', KEYS[k] .. '.holds')
end
return counts

-- Resets counters whose values no script can read: written by something else, or damaged. What is readable stays.
-- KEYS: the counters; last a key of the same slot that never exists. ARGV: for each counter its algorithm and parameters as in charge.lua;
-- then the cost of the check that failed. Answers which counters were reset, 1 for the first.
-- Where the key that never exists cannot be read either, the fault is not in the values (a command that is not allowed, say): nothing is reset.

local cost = tonumber(ARGV[#ARGV])

local function is_readable(key, config)
  return (pcall(function()
    local algorithm = algorithms[config[1]]
    local held = algorithm.load(key)
    for i = 2, #config, algorithm.parameters do
      algorithm.decide(held, algorithm.find(held, config[i]), {}, now, cost, config[i], config[i + 1], config[i + 2], config[i + 3])
    end
    if algorithm.verify then
      algorithm.verify(held)
    end
  end))
end

local reset = {}
for k = 1, #KEYS - 1 do
  local config = cmsgpack.unpack(ARGV[k])
  if not is_readable(KEYS[k], config) and is_readable(KEYS[#KEYS], config) then
    redis.call('UNLINK', KEYS[k])
    reset[#reset + 1] = k
  end
end
return reset

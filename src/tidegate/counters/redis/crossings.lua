-- For scripts that charge whatever the limits say: what is left of each limit before and after. KEYS and ARGV begin with the counters, and for
-- each its algorithm and parameters as in charge.lua. What comes next is the body of a function `charge_anyway`; crossings_end.lua calls it.

local find_loaders = {}
for name, algorithm in pairs(algorithms) do
  -- A script may replace them by others that load a state once.
  find_loaders[name] = type(algorithm) == 'table' and algorithm.load
end

-- For each limit of a counter what is left; false where no settlement charges it.
local function find_left(key, config, found)
  local name = algorithms[config[1]] and config[1] or string.sub(config[1], 6)
  local algorithm = algorithms[name]
  local counts = not algorithm.settle and name ~= 'concurrent'
  local held = counts and find_loaders[name](key)
  for i = 2, #config, algorithm.parameters do
    local remaining = false
    if counts then
      local _
      _, remaining = algorithm.decide(
        held, algorithm.find(held, config[i]), {}, now, 0, config[i], config[i + 1], config[i + 2], config[i + 3])
    end
    found[#found + 1] = remaining
  end
end

local function all_left()
  local found = {}
  for k = 1, #KEYS do
    find_left(KEYS[k], cmsgpack.unpack(ARGV[k]), found)
  end
  return found
end

local function charge_anyway()

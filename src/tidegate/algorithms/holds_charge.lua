-- Twin of `charge` of holds.py: charges units whatever the limits say.

local UNBOUNDED = 1125899906842624

local function charge_beyond(key, config, cost)
  local name = algorithms[config[1]] and config[1] or string.sub(config[1], 6)
  local algorithm = algorithms[name]
  if algorithm.settle then
    algorithm.settle(key, config, cost, false)
    return
  end
  local held, fresh, longest = algorithm.load(key), {}, 0
  for i = 2, #config, algorithm.parameters do
    local window, most = config[i], config[i + 2]
    if name == 'quota' then
      most = UNBOUNDED
    end
    local unbounded = name == 'token_bucket' and MAX_EXACT or UNBOUNDED
    local _, _, reset = algorithm.decide(
      held, algorithm.find(held, window), fresh, now, cost, window, unbounded, most, config[i + 3])
    longest = math.max(longest, reset)
  end
  if name == 'token_bucket' then
    for at = 2, #fresh, 5 do
      fresh[at] = math.min(fresh[at], MAX_EXACT)
    end
  end
  algorithm.save(key, held, fresh, math.ceil(longest / 1000), now, cost)
end

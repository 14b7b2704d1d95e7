-- Decides all limits of a check and charges all of them or none.
-- keys: one counter each. configs: for each its algorithm and parameters, {algorithm, window, amount, ...}.
-- Gives binding, remaining, reset, retry, now: binding is the place of the limit that is reported, 1 for the first, negative where it
-- denies; retry is -1 for never; microseconds.
local function decide(keys, configs, cost)
  local place, binding, least, reset_after, retry_after = 0, 0, -1, 0, 0
  local denied, never = false, false
  local writes = {}
  for k = 1, #keys do
    local config = configs[k]
    local algorithm = algorithms[config[1]]
    local held, fresh, longest = algorithm.load(keys[k]), {}, 0
    for i = 2, #config, algorithm.parameters do
      local window = config[i]
      local allowed, remaining, reset, retry = algorithm.decide(
        held, algorithm.find(held, window), fresh, now, cost, window, config[i + 1], config[i + 2], config[i + 3])
      place = place + 1
      if not allowed then
        if not denied or remaining < least then
          binding, least, reset_after = place, remaining, reset
        end
        denied = true
        if retry < 0 then
          never = true
        elseif retry > retry_after then
          retry_after = retry
        end
      elseif not denied and (remaining < least or least < 0) then
        binding, least, reset_after = place, remaining, reset
      end
      if reset > longest then
        longest = reset
      end
    end
    writes[k] = {algorithm, held, fresh, longest}
  end
  local charged = cost > 0 and not denied
  for k = 1, #keys do
    local algorithm, held, fresh, longest = unpack(writes[k])
    if charged then
      algorithm.save(keys[k], held, fresh, math.ceil(longest / 1000), now, cost)
    elseif algorithm.tidy then
      algorithm.tidy(held)
    end
  end
  return denied and -binding or binding, least, reset_after, never and -1 or retry_after, now
end

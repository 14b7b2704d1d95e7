-- Decides all limits of a check and charges all of them or none.
-- keys: one counter each. configs: for each its algorithm and parameters, {algorithm, window, amount, ...}. Where the algorithm has
-- 'soft:' before its name, a check that the counter denies passes as over, and that counter is not charged.
-- Gives binding, remaining, reset, retry, now: binding is the place of the limit that is reported, 1 for the first, negative where it
-- denies; retry is -1 for never; microseconds. remaining is below 0 where the check passes as over: by the units that are above a quota
-- or a soft limit; of a check of cost 0, by all that is above the quota so far.
-- `left` is nil, or a table: then it gets what is left of each limit after the charge, false where it is not charged, and is given too.
-- `decided` is, for each counter: its algorithm, its state before, its state after, for how many microseconds that counts, and whether a soft
-- limit let the cost pass uncharged.
local decided

local function decide(keys, configs, cost)
  local place, binding, least, reset_after, retry_after = 0, 0, -1, 0, 0
  local denied, never, over = false, false, 0
  local writes = {}
  for k = 1, #keys do
    local config = configs[k]
    local algorithm, soft, uncharged = algorithms[config[1]], false, false
    if not algorithm then
      algorithm, soft = algorithms[string.sub(config[1], 6)], true
    end
    local held, fresh, longest = algorithm.load(keys[k]), {}, 0
    for i = 2, #config, algorithm.parameters do
      local window = config[i]
      local allowed, remaining, reset, retry = algorithm.decide(
        held, algorithm.find(held, window), fresh, now, cost, window, config[i + 1], config[i + 2], config[i + 3])
      place = place + 1
      if left then
        left[place] = remaining
      end
      if soft and not allowed then
        allowed, uncharged, over = true, true, math.max(over, cost)
      elseif remaining < 0 then
        over = math.max(over, cost > 0 and math.min(-remaining, cost) or -remaining)
        remaining = 0
      end
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
    if left and uncharged then
      for i = place, place - (#config - 1) / algorithm.parameters + 1, -1 do
        left[i] = false
      end
    end
    writes[k] = {algorithm, held, fresh, longest, uncharged}
  end
  decided = writes
  local charged = cost > 0 and not denied
  for k = 1, #keys do
    local algorithm, held, fresh, longest, uncharged = unpack(writes[k])
    if charged and not uncharged then
      algorithm.save(keys[k], held, fresh, math.ceil(longest / 1000), now, cost)
    elseif algorithm.tidy then
      algorithm.tidy(held)
    end
  end
  if over > 0 and not denied then
    least = -over
  end
  return denied and -binding or binding, least, reset_after, never and -1 or retry_after, now, left
end

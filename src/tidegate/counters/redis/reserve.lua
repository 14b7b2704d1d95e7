-- Reserves: finds the first moment at which a cost passes all its limits, and charges it for then. KEYS and the first ARGV as in
-- charge.lua; then the cost, and how many microseconds ahead the moment may be. A last key that ends with '.reserved' is
-- where the reservation is remembered until its moment, so that it can be cancelled by its id.
-- Gives binding, remaining, reset, retry and now as charge.lua does, remaining after the charge; then the moment, 0 where it is
-- denied: because it never passes, or not that soon, and then retry is how long it would have to wait. Nothing is charged then.
local count, remembered = #KEYS, nil
if string.sub(KEYS[count], -9) == '.reserved' then
  count, remembered = count - 1, KEYS[count]
end
local cost, most = tonumber(ARGV[count + 1]), tonumber(ARGV[count + 2])
local configs, loaded = {}, {}
for k = 1, count do
  configs[k] = cmsgpack.unpack(ARGV[k])
  loaded[k] = algorithms[configs[k][1]].load(KEYS[k])
end

-- Decides all limits as of a moment. Writes nothing.
local function decide_at(moment)
  local found = {place = 0, binding = 0, least = -1, reset = 0, retry = 0, denied = false, fresh = {}, longest = {}}
  for k = 1, count do
    local config, held = configs[k], loaded[k]
    local algorithm = algorithms[config[1]]
    found.fresh[k], found.longest[k] = {}, 0
    for i = 2, #config, algorithm.parameters do
      local allowed, remaining, reset, retry = algorithm.decide(
        held, algorithm.find(held, config[i]), found.fresh[k], moment, cost, config[i], config[i + 1], config[i + 2], config[i + 3])
      found.place = found.place + 1
      if allowed ~= found.denied and (remaining < found.least or found.least < 0) or not allowed and not found.denied then
        found.binding, found.least, found.reset = found.place, remaining, reset
      end
      if not allowed then
        found.denied = true
        if retry < 0 or found.retry < 0 then
          found.retry = -1
        else
          found.retry = math.max(found.retry, retry)
        end
      end
      found.longest[k] = math.max(found.longest[k], reset)
    end
  end
  return found
end

local function deny(found, retry)
  return {-found.binding, found.least, found.reset, retry, now, 0}
end

local found = decide_at(now)
local first, ahead = found, 0
if found.denied then
  ahead = found.retry
  if ahead < 0 or ahead > most then
    return deny(first, ahead)
  end
  found = decide_at(now + ahead)
  if found.denied then
    return deny(first, ahead)
  end
end
if cost == 0 then
  return {found.binding, found.least, ahead + found.reset, 0, now, now + ahead}
end
for k = 1, count do
  local config, held, fresh = configs[k], loaded[k], found.fresh[k]
  local algorithm, n = algorithms[config[1]], 0
  for i = 2, #config, algorithm.parameters do
    if not reserve_state(config[1], fresh, n, held, algorithm.find(held, config[i]), now) then
      return deny(first, ahead)
    end
    n = n + algorithm.width + 1
  end
end
for k = 1, count do
  algorithms[configs[k][1]].save(KEYS[k], loaded[k], found.fresh[k], math.ceil((ahead + found.longest[k]) / 1000), now, cost)
end
if remembered and ahead > 0 then
  redis.call('SET', remembered, cmsgpack.pack({now, now + ahead}), 'PX', math.ceil(ahead / 1000))
end
return {found.binding, found.least, ahead + found.reset, 0, now, now + ahead}

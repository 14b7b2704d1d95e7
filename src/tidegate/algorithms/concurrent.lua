-- Twin of concurrent.py. The slots that are taken are the holds of the counter: see reclaim.lua. Parameters: window, which is not used, and
-- amount. A script that opens a hold sets algorithms.slots_wanted to 1: then one has to be free whatever the cost, and is counted as taken.

local function concurrent_load(key)
  return {taken = redis.call('ZCARD', key .. '.holds')}
end

local function concurrent_decide(held, _, _, _, cost, _, amount)
  local wanted = algorithms.slots_wanted or 0
  local free = amount - held.taken
  if free > 0 or (cost == 0 and wanted == 0) then
    return true, math.max(free - wanted, 0), 0, 0
  end
  return false, 0, 0, 1000000
end

local function concurrent_nothing()
end

algorithms.concurrent = {
  parameters = 2, load = concurrent_load, find = concurrent_nothing, decide = concurrent_decide, save = concurrent_nothing,
  absorb = concurrent_nothing,
}

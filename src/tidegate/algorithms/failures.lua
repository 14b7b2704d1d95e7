-- Twin of failures.py. State: penalties in a row, when the last one ends, until when it is remembered, times of failures; attempts in progress
-- are the holds of the counter: see reclaim.lua. Parameters: window in seconds, amount, and of the rule, the same for each limit, whether a
-- success clears (1 or 0), then the penalties in seconds. A script that opens a hold sets algorithms.slots_wanted to 1: then one has to be free
-- whatever the cost, and is counted as taken.

local function failures_load(key)
  local raw = redis.call('GET', key)
  local held = raw and {cmsgpack.unpack(raw)} or {0, 0, 0}
  held.taken = redis.call('ZCARD', key .. '.holds')
  return held
end

-- How many failures are in a window.
local function failures_in(held, window, now)
  local count = 0
  for at = #held, 4, -1 do
    if held[at] <= now - window * 1000000 then
      break
    end
    count = count + 1
  end
  return count
end

local function failures_decide(held, _, _, now, cost, window, amount)
  local wanted, length = algorithms.slots_wanted or 0, window * 1000000
  local peeks = cost == 0 and wanted == 0
  if held[2] > now then
    return peeks, 0, held[2] - now, peeks and 0 or held[2] - now
  end
  local failed = failures_in(held, window, now)
  local reset = failed > 0 and held[#held] + length - now or 0
  local free = amount - failed - held.taken
  if free > 0 or peeks then
    return true, math.max(free - wanted, 0), reset, 0
  end
  return false, 0, reset, failed >= amount and held[#held - amount + 1] + length - now or 1000000
end

local function failures_nothing()
end

-- Records the outcome of an attempt that is not in progress any more.
local function failures_settle(key, config, failed, success)
  local rule = config[4]
  if failed == 0 then
    if success and rule[1] == 1 then
      redis.call('DEL', key)
    end
    return
  end
  local held, longest, most = failures_load(key), 0, 0
  for i = 2, #config, 3 do
    longest, most = math.max(longest, config[i]), math.max(most, config[i + 1])
  end
  local moment, times = math.max(now, held[4] and held[#held] or 0), {}
  for at = 4, #held do
    if held[at] > now - longest * 1000000 then
      times[#times + 1] = held[at]
    end
  end
  for _ = 1, math.min(failed, most) do
    times[#times + 1] = moment
  end
  local fresh = {held[1], held[2], held[3]}
  for at = math.max(#times - most, 0) + 1, #times do
    fresh[#fresh + 1] = times[at]
  end
  local reached = false
  for i = 2, #config, 3 do
    reached = reached or failures_in(fresh, config[i], now) >= config[i + 1]
  end
  if reached and #rule > 1 then
    local level = held[3] > now and held[1] or 0
    local penalty = rule[math.min(level + 2, #rule)] * 1000000
    fresh = {level + 1, now + penalty, now + penalty + math.max(penalty, longest * 1000000)}
  end
  local kept = math.max(fresh[3], fresh[4] and fresh[#fresh] + longest * 1000000 or 0)
  redis.call('SET', key, cmsgpack.pack(unpack(fresh)), 'PX', math.max(math.ceil((kept - now) / 1000), 1))
end

algorithms.failures = {
  parameters = 3, load = failures_load, find = failures_nothing, decide = failures_decide, save = failures_nothing,
  absorb = failures_nothing, settle = failures_settle,
}

-- Twin of token_bucket.py, and so of leaky_bucket.py, which is its arithmetic with another default burst. State: level, scale, rate, at (microseconds).
-- Parameters: window in seconds (0: a month of 31 days, -1: a year of 366), burst, scale, rate.
-- While units are leased, an entry named LEASES is in the value: end in seconds, units, later end, later units. It counts for all windows.

local MAX_EXACT = 9007199254740992
local LEASES = -2

-- End and units of the earlier leases and of the later ones, microseconds; zeros where there are none.
local function bucket_leases(held)
  for at = 1, #held, 5 do
    if held[at] == LEASES then
      return held[at + 1] * 1000000, held[at + 2], held[at + 3] * 1000000, held[at + 4]
    end
  end
  return 0, 0, 0, 0
end

-- Those that have not ended.
local function bucket_live_leases(held, now)
  local ends, units, later_end, later = bucket_leases(held)
  if ends <= now or units == 0 then
    ends, units, later_end, later = later_end, later, 0, 0
  end
  if ends <= now or units == 0 then
    return 0, 0, 0, 0
  end
  return ends, units, later_end, later
end

-- A level, and the moment that it is of, after a time in which it does not drain below a floor.
local function bucket_above(level, moment, now, ends, floor, rate)
  if ends <= moment then
    return level, moment
  end
  local till = math.min(ends, now)
  return math.max(level - (till - moment) * rate, math.min(level, floor)), till
end

-- A level as it stands later, in units of 1 / scale token. A product beyond 2^53 is inexact, but then it is above any level.
local function bucket_level(held, at, now, scale, rate)
  local level, old_scale, old_rate, moment = held[at + 1], held[at + 2], held[at + 3], held[at + 4]
  local ends, units, later_end, later = bucket_leases(held)
  if ends > 0 then
    level, moment = bucket_above(level, moment, now, ends, (units + later) * old_scale, old_rate)
    level, moment = bucket_above(level, moment, now, later_end, later * old_scale, old_rate)
  end
  level = level - (now - moment) * old_rate
  if level <= 0 then
    return 0
  end
  if old_scale ~= scale or old_rate ~= rate then
    return math.min(divide_up(level, old_scale) * scale, MAX_EXACT)
  end
  return level
end

-- Microseconds until a level is at most a target.
local function bucket_until(level, target, now, scale, rate, ends, units, later_end, later)
  local at = now
  for group = 1, 2 do
    local floor
    if group == 1 then
      floor = (units + later) * scale
    else
      ends, floor = later_end, later * scale
    end
    if ends > at then
      local needed = level > target and divide_up(level - target, rate) or 0
      if needed == 0 or (target >= floor and at + needed <= ends) then
        return at - now + needed
      end
      level = math.max(level - rate * (ends - at), math.min(level, floor))
      at = ends
    end
  end
  return at - now + (level > target and divide_up(level - target, rate) or 0)
end

local function bucket_decide(held, at, fresh, now, cost, window, burst, scale, rate)
  local level = 0
  local ends, units, later_end, later = 0, 0, 0, 0
  if at then
    now = math.max(now, held[at + 4])
    level = bucket_level(held, at, now, scale, rate)
    ends, units, later_end, later = bucket_live_leases(held, now)
  end
  local most = burst * scale
  if cost == 0 or (cost <= burst and level <= (burst - cost) * scale) then
    local charged = level + cost * scale
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3], fresh[n + 4], fresh[n + 5] = window, charged, scale, rate, now
    return true, charged < most and divide(most - charged, scale) or 0,
      bucket_until(charged, 0, now, scale, rate, ends, units, later_end, later), 0
  end
  return false,
    level < most and divide(most - level, scale) or 0,
    bucket_until(level, 0, now, scale, rate, ends, units, later_end, later),
    cost <= burst and bucket_until(level, (burst - cost) * scale, now, scale, rate, ends, units, later_end, later) or -1
end

-- A refund's level is below 0 and does not drain.
local bucket_merge = absorbs and function(mine, other, _, _, scale, rate, held, where)
  local at, level = other[4], 0
  if mine then
    at = math.max(mine[4], other[4])
    level = bucket_level(held, where, at, scale, rate)
  end
  if other[1] < 0 then
    level = level - divide(-other[1], other[2]) * scale
  else
    level = level + bucket_level({0, other[1], other[2], other[3], other[4]}, 1, at, scale, rate)
  end
  return {math.min(math.max(level, 0), MAX_EXACT), scale, rate, at}
end

packed('token_bucket', 4, 4, bucket_decide, bucket_merge, LEASES)

local bucket_save = algorithms.token_bucket.save

-- What is charged does not end the leases.
algorithms.token_bucket.save = function(key, held, fresh, ttl)
  local ends, units, later_end, later = bucket_live_leases(held, fresh[5])
  if units > 0 then
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3], fresh[n + 4], fresh[n + 5] = LEASES, ends / 1000000, units, later_end / 1000000, later
  end
  bucket_save(key, held, fresh, ttl)
end

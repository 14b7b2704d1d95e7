-- Twin of token_bucket.py, and so of leaky_bucket.py, which is its arithmetic with another default burst. State: level, scale, rate, at (microseconds).
-- Parameters: window in seconds (0: a month of 31 days, -1: a year of 366), burst, scale, rate.

local MAX_EXACT = 9007199254740992

-- A level as it stands later, in units of 1 / scale token. A product beyond 2^53 is inexact, but then it is above any level.
local function bucket_level(level, old_scale, old_rate, elapsed, scale, rate)
  level = level - elapsed * old_rate
  if level <= 0 then
    return 0
  end
  if old_scale ~= scale or old_rate ~= rate then
    return math.min(divide_up(level, old_scale) * scale, MAX_EXACT)
  end
  return level
end

local function bucket_decide(held, at, fresh, now, cost, window, burst, scale, rate)
  local level = 0
  if at then
    now = math.max(now, held[at + 4])
    level = bucket_level(held[at + 1], held[at + 2], held[at + 3], now - held[at + 4], scale, rate)
  end
  local most = burst * scale
  if cost == 0 or (cost <= burst and level <= (burst - cost) * scale) then
    local charged = level + cost * scale
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3], fresh[n + 4], fresh[n + 5] = window, charged, scale, rate, now
    return true, charged < most and divide(most - charged, scale) or 0, divide_up(charged, rate), 0
  end
  return false,
    level < most and divide(most - level, scale) or 0,
    divide_up(level, rate),
    cost <= burst and divide_up(level - (burst - cost) * scale, rate) or -1
end

-- A refund's level is below 0 and does not drain.
local function bucket_merge(mine, other, _, _, scale, rate)
  mine = mine or {0, scale, rate, other[4]}
  local at = math.max(mine[4], other[4])
  local level = bucket_level(mine[1], mine[2], mine[3], at - mine[4], scale, rate)
  if other[1] < 0 then
    level = level - divide(-other[1], other[2]) * scale
  else
    level = level + bucket_level(other[1], other[2], other[3], at - other[4], scale, rate)
  end
  return {math.min(math.max(level, 0), MAX_EXACT), scale, rate, at}
end

packed('token_bucket', 4, 4, bucket_decide, bucket_merge)

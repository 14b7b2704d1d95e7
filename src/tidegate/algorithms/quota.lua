-- Twin of quota.py. State: the last charge in seconds, used.
-- Parameters: period (1: second … 7: year), amount, the most with overage, boundaries: the length of all periods in seconds, or moments
-- in seconds at which periods begin. Time zones cannot be computed here: an instance sends the boundaries around its own clock, and
-- this server's clock picks the period. Beyond them periods are as long as the nearest one that is known.

-- Days for which a state is kept, ms; nil until its period ends.
local QUOTA_KEPT = {nil, nil, nil, 172800000, 777600000, 2851200000, 31795200000}

local function quota_period(now, boundaries)
  if type(boundaries) == 'number' then
    local length = boundaries * 1000000
    local start = now - fmod(now, length)
    return start, start + length
  end
  local last = #boundaries
  for i = last, 1, -1 do
    local start = boundaries[i] * 1000000
    if now >= start then
      if i < last then
        return start, boundaries[i + 1] * 1000000
      end
      local length = start - boundaries[i - 1] * 1000000
      start = now - fmod(now - start, length)
      return start, start + length
    end
  end
  local first = boundaries[1] * 1000000
  local length = boundaries[2] * 1000000 - first
  local start = first - divide_up(first - now, length) * length
  return start, start + length
end

local function quota_decide(held, at, fresh, now, cost, window, amount, most, boundaries)
  local last = at and held[at + 1] * 1000000
  if last and now < last then
    now = last
  end
  local start, ends = quota_period(now, boundaries)
  local used = last and last >= start and held[at + 2] or 0
  local total = used + cost
  if total <= most or cost == 0 then
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3] = window, divide(now, 1000000), total
    return true, amount - total, ends - now, 0
  end
  return false, math.max(amount - used, 0), ends - now, cost <= most and ends - now or -1
end

local quota_merge = absorbs and function(mine, other, _, _, _, boundaries)
  mine = mine or {other[1], 0}
  local last = math.max(mine[1], other[1])
  local start = quota_period(last * 1000000, boundaries) / 1000000
  return {last, math.max((mine[1] >= start and mine[2] or 0) + (other[1] >= start and other[2] or 0), 0)}
end

packed('quota', 2, 4, quota_decide, quota_merge, nil, QUOTA_KEPT)

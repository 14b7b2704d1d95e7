-- Twin of fixed_window.py. State: start in seconds, below 0 for a reserved window that has not begun; used.
-- Parameters: window in seconds (0: the calendar month, -1: the year), amount.

local function fixed_window_bounds(now, window)
  if window <= 0 then
    return calendar_bounds(now, window)
  end
  local start = now - fmod(now, window * 1000000)
  return start, start + window * 1000000
end

local function fixed_window_decide(held, at, fresh, now, cost, window, amount)
  local start, ends = fixed_window_bounds(now, window)
  local used = 0
  if at then
    local held_start = held[at + 1] * 1000000
    if held_start < 0 then
      return decide_reserved(fixed_window_decide, held, at, fresh, now, cost, window, amount)
    end
    if held_start >= start then
      if held_start > start then
        now = held_start
        start, ends = fixed_window_bounds(now, window)
      end
      used = held[at + 2]
    end
  end
  local free = amount - used
  if cost <= free or cost == 0 then
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3] = window, start / 1000000, used + cost
    return true, math.max(free - cost, 0), ends - now, 0
  end
  return false, math.max(free, 0), ends - now, cost <= amount and ends - now or -1
end

local fixed_window_merge = absorbs and function(mine, other)
  local begins = mine and math.abs(mine[1])
  if not mine or other[1] > begins then
    return {other[1], math.max(other[2], 0)}
  elseif other[1] < begins then
    return mine
  end
  return {mine[1], math.max(mine[2] + other[2], 0)}
end

packed('fixed_window', 2, 2, fixed_window_decide, fixed_window_merge)

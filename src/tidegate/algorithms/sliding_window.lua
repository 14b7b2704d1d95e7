-- Twin of sliding_window.py. State: start in seconds, below 0 for a reserved window that has not begun, current, previous.
-- Parameters: window in seconds (0: the calendar month, -1: the year), amount.

local function sliding_window_reset(current, previous, left, window, following)
  if current > 0 then
    return left + following + 1 - divide_up(following, current)
  end
  if previous > 0 then
    return math.max(left + 1 - divide_up(window, previous), 0)
  end
  return 0
end

local function sliding_window_retry(amount, current, previous, left, window, following, cost)
  if cost > amount then
    return -1
  end
  local room = amount - current - cost
  local quotient, rest
  if room >= 0 then
    quotient, rest = multiply_divide(room + 1, window, previous)
    return left + 1 - quotient - (rest > 0 and 1 or 0)
  end
  quotient, rest = multiply_divide(amount - cost + 1, following, current)
  return left + following + 1 - quotient - (rest > 0 and 1 or 0)
end

local function sliding_window_decide(held, at, fresh, now, cost, window, amount)
  local start, current, previous = nil, 0, 0
  local length, following
  if at and held[at + 1] < 0 then
    return decide_reserved(sliding_window_decide, held, at, fresh, now, cost, window, amount)
  end
  if window <= 0 then
    local held_start = at and held[at + 1] * 1000000
    if held_start and now < held_start then
      now = held_start
    end
    local ends
    start, ends = calendar_bounds(now, window)
    length = ends - start
    if held_start == start then
      current, previous = held[at + 2], held[at + 3]
    elseif held_start and calendar_bounds(start - 1, window) == held_start then
      previous = held[at + 2]
    end
    local following_start, following_end = calendar_bounds(ends, window)
    following = following_end - following_start
  else
    length = window * 1000000
    following = length
    if at then
      start, current, previous = held[at + 1] * 1000000, held[at + 2], held[at + 3]
      local elapsed = now - start
      if elapsed >= length then
        previous = elapsed < 2 * length and current or 0
        current = 0
        start = now - fmod(now, length)
      elseif elapsed < 0 then
        now = start
      end
    else
      start = now - fmod(now, length)
    end
  end
  local left = start + length - now
  local free = amount - current
  if previous > 0 then
    free = free - multiply_divide(previous, left, length)
  end
  if cost <= free or cost == 0 then
    current = current + cost
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3], fresh[n + 4] = window, start / 1000000, current, previous
    return true, math.max(free - cost, 0), sliding_window_reset(current, previous, left, length, following), 0
  end
  return false,
    math.max(free, 0),
    sliding_window_reset(current, previous, left, length, following),
    sliding_window_retry(amount, current, previous, left, length, following, cost)
end

-- What a state says once its start is that of a window that is not earlier: current and previous.
local function sliding_window_at(state, start, window)
  if state[1] == start then
    return state[2], state[3]
  end
  local before = window <= 0 and calendar_bounds(start * 1000000 - 1, window) / 1000000 or start - window
  return 0, state[1] == before and state[2] or 0
end

local sliding_window_merge = absorbs and function(mine, other, window)
  mine = mine or {other[1], 0, 0}
  local sign = mine[1] < 0 and -mine[1] >= other[1] and -1 or 1
  mine[1] = math.abs(mine[1])
  local start = math.max(mine[1], other[1])
  local current, previous = sliding_window_at(mine, start, window)
  local more, more_before = sliding_window_at(other, start, window)
  return {sign * start, math.max(current + more, 0), math.max(previous + more_before, 0)}
end

packed('sliding_window', 3, 2, sliding_window_decide, sliding_window_merge)

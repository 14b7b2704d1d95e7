-- Twin of reservations.py. The states and parameters are those of each algorithm; `held` and `fresh` as in packed.lua.

-- Makes of a state that was decided at a later moment, in `fresh` from `n` on, the one to store. Whether it can be counted exactly.
local function reserve_state(name, fresh, n, held, at, now)
  if name ~= 'token_bucket' then
    if fresh[n + 2] * 1000000 > now then
      fresh[n + 2] = -fresh[n + 2]
    end
    return true
  end
  if at then
    now = math.max(now, held[at + 4])
  end
  fresh[n + 2] = fresh[n + 2] + fresh[n + 4] * (fresh[n + 5] - now)
  fresh[n + 5] = now
  return fresh[n + 2] <= 9007199254740992
end

local function release_bucket(held, at, now, moment, cost, burst, scale, rate)
  now = math.max(now, held[at + 4])
  local level = bucket_level(held, at, now, scale, rate)
  local behind = level - rate * math.max(moment - now, 0) - burst * scale
  behind = behind > 0 and behind + rate or 0
  local units = math.min(cost, math.max(burst - divide_up(behind, scale), 0), (divide(level, scale)))
  held[at + 1], held[at + 2], held[at + 3], held[at + 4] = level - units * scale, scale, rate, now
  return units
end

-- Gives back to the window that the units were charged in.
local function release_window(name, held, at, moment, cost, window)
  local start
  if window <= 0 then
    start = calendar_bounds(moment, window) / 1000000
  else
    start = (moment - fmod(moment, window * 1000000)) / 1000000
  end
  local begins, place = math.abs(held[at + 1]), at + 2
  if start ~= begins then
    local before = window <= 0 and calendar_bounds(begins * 1000000 - 1, window) / 1000000 or begins - window
    if name ~= 'sliding_window' or start ~= before then
      return 0
    end
    place = at + 3
  end
  local units = math.min(held[place], cost)
  held[place] = held[place] - units
  return units
end

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

local function start_of(moment, window)
  if window <= 0 then
    return calendar_bounds(moment, window) / 1000000
  end
  return (moment - fmod(moment, window * 1000000)) / 1000000
end

-- Whether others may have been given a later moment because of the limit whose parameters are in `config` from `i` on.
local function is_followed(name, held, at, now, moment, config, i)
  if name == 'token_bucket' then
    now = math.max(now, held[at + 4])
    local burst, scale, rate = config[i + 1], config[i + 2], config[i + 3]
    return bucket_level(held, at, now, scale, rate) - rate * math.max(moment - now, 0) > burst * scale
  end
  return name == 'sliding_window' or math.abs(held[at + 1]) > start_of(moment, config[i])
end

local function release_bucket(held, at, now, cost, scale, rate)
  now = math.max(now, held[at + 4])
  local level = bucket_level(held, at, now, scale, rate)
  local units = math.min(cost, (divide(level, scale)))
  held[at + 1], held[at + 2], held[at + 3], held[at + 4] = level - units * scale, scale, rate, now
  return units
end

-- Gives back to the window that the units were charged in.
local function release_window(name, held, at, moment, cost, window)
  local start = start_of(moment, window)
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

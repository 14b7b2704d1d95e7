-- Twin of leases.py: what a lease means to each algorithm. The parameters of a counter are as in charge.lua.

local MIN_LIFE = 20000
local AHEAD_LIFE = 5000000
local MIN_AHEAD = 2

local function lease_window(now, window)
  if window <= 0 then
    return calendar_bounds(now, window)
  end
  local start = now - fmod(now, window * 1000000)
  return start, start + window * 1000000
end

-- How long a lease that begins now may live, microseconds.
local function lease_life(config, now, ttl)
  if config[1] == 'token_bucket' then
    return ttl
  end
  for i = 2, #config, algorithms[config[1]].parameters do
    local _, ends
    if config[1] == 'quota' then
      _, ends = quota_period(now, config[i + 3])
    else
      _, ends = lease_window(now, config[i])
    end
    ttl = math.min(ttl, ends - now)
  end
  return ttl
end

-- Where the state of a window, or a bucket's entry of leases (-2), begins in what was loaded.
local function lease_find(held, width, window)
  for at = 1, #held, width do
    if held[at] == window then
      return at
    end
  end
end

-- Remembers in a bucket's value, which was charged already, that units are leased.
local function lease_hold(key, config, now, units, ends)
  if config[1] ~= 'token_bucket' then
    return
  end
  local held = algorithms.token_bucket.load(key)
  local latest = held[1] == -2 and held[10] or held[5]
  local first, known, later_end, later = bucket_live_leases(held, latest)
  local second = math.ceil(ends / 1000000) * 1000000
  if known == 0 then
    first, known, later_end, later = second, units, 0, 0
  else
    later_end, later = math.max(first, later_end, second), later + units
  end
  local at = lease_find(held, 5, -2) or #held + 1
  held[at], held[at + 1], held[at + 2], held[at + 3], held[at + 4] = -2, first / 1000000, known, later_end / 1000000, later
  local longest = 0
  for i = 1, #held, 5 do
    if held[i] ~= -2 then
      longest = math.max(longest, held[i + 4] - now + bucket_until(
        held[i + 1], 0, held[i + 4], held[i + 2], held[i + 3], first, known, later_end, later))
    end
  end
  redis.call('SET', key, cmsgpack.pack(unpack(held)), 'PX', math.max(math.ceil(longest / 1000), 1))
end

-- Charges units of a sliding window that come free until the lease ends. `fresh` is its state now.
local function lease_ahead(key, config, fresh, now, want, life)
  local length, start, current, previous = config[2] * 1000000, fresh[2], fresh[3], fresh[4]
  local left = start * 1000000 + length - now
  life = math.min(life, AHEAD_LIFE, left)
  if start < 0 or left > length or life < MIN_LIFE then
    return 0, 0, 0, 0, 0
  end
  local units = math.min(want, config[3] - current - (multiply_divide(previous, left - life, length)))
  if units < MIN_AHEAD then
    return 0, 0, 0, 0, 0
  end
  fresh[3] = current + units
  local counts = left + length + 1 - divide_up(length, current + units)
  algorithms.sliding_window.save(key, nil, fresh, math.ceil(counts / 1000))
  return units, now + life, current, previous, start
end

-- Gives back to the windows that the units were charged in. Whether anything changed.
local function lease_back_to_windows(held, config, width, unused, charged_at)
  local changed = false
  for i = 2, #config, 2 do
    local window = config[i]
    local at, start = lease_find(held, width, window), lease_window(charged_at, config[i]) / 1000000
    if at and held[at + 1] == start then
      held[at + 2] = math.max(held[at + 2] - unused, 0)
      changed = true
    elseif at and width == 4 and start < held[at + 1] then
      local before = window <= 0 and calendar_bounds(held[at + 1] * 1000000 - 1, window) / 1000000 or held[at + 1] - window
      if before == start then
        held[at + 3] = math.max(held[at + 3] - unused, 0)
        changed = true
      end
    end
  end
  return changed
end

-- Gives back to the periods that the units were charged in.
local function lease_back_to_quota(held, config, unused, charged_at)
  local changed, second = false, divide(charged_at, 1000000)
  for i = 2, #config, 4 do
    local at = lease_find(held, 3, config[i])
    if at and second <= held[at + 1] and second * 1000000 >= quota_period(held[at + 1] * 1000000, config[i + 3]) then
      held[at + 2] = math.max(held[at + 2] - unused, 0)
      changed = true
    end
  end
  return changed
end

local function lease_back_to_bucket(held, now, units, unused, ends)
  for at = 1, #held, 5 do
    if held[at] ~= -2 then
      now = math.max(now, held[at + 4])
    end
  end
  local first, known, later_end, later = bucket_live_leases(held, now)
  if now >= ends or known == 0 or known + later < units then
    return false
  end
  for at = 1, #held, 5 do
    if held[at] ~= -2 then
      local scale = held[at + 2]
      held[at + 1] = math.max(bucket_level(held, at, now, scale, held[at + 3]) - unused * scale, 0)
    end
  end
  for at = 1, #held, 5 do
    if held[at] ~= -2 then
      held[at + 4] = now
    end
  end
  local from_known = math.min(known, units)
  local at = lease_find(held, 5, -2)
  held[at + 1], held[at + 2] = first / 1000000, known - from_known
  held[at + 3], held[at + 4] = later_end / 1000000, later - (units - from_known)
  return true
end

-- Gives up a lease; the key expires when it would have. Whether the lease was still in the counter.
local function lease_give_back(key, config, now, units, unused, charged_at, ends)
  local held, changed = algorithms[config[1]].load(key), false
  if #held == 0 then
    return false
  end
  if config[1] == 'token_bucket' then
    changed = lease_back_to_bucket(held, now, units, unused, ends)
  elseif config[1] == 'quota' then
    changed = lease_back_to_quota(held, config, unused, charged_at)
  else
    changed = lease_back_to_windows(held, config, config[1] == 'sliding_window' and 4 or 3, unused, charged_at)
  end
  if changed then
    redis.call('SET', key, cmsgpack.pack(unpack(held)), 'KEEPTTL')
  end
  return changed
end

-- Twin of sliding_log.py. All windows of a rule share one list: a header, then one entry per admission, [moment, cost], oldest first.
-- Header: moment of the last entry, then for each window: its name, units used, entries at the front that no longer count for it.
-- A list keeps an entry in 13 to 16 bytes whatever its length; a sorted set takes 100 beyond its compact form.
-- Parameters: window in seconds (0: a month of 31 days, -1: a year of 366), amount.

local TIDY = 128
-- Most entries that a denial examines to find its retry: a thousand take Redis 0.2 ms, during which it does nothing else.
local LOOK_AHEAD = 1000

local function sliding_log_length(window)
  return (window == 0 and 2678400 or window == -1 and 31622400 or window) * 1000000
end

local function sliding_log_load(key)
  local header = redis.call('LINDEX', key, 0)
  if not header then
    return {key = key, entries = 0, advanced = 0, chunk = {}, from = 0, size = 1}
  end
  local held = {cmsgpack.unpack(header)}
  held.last = table.remove(held, 1)
  held.key, held.entries, held.advanced = key, redis.call('LLEN', key) - 1, 0
  -- One entry is read first, which is mostly enough; then ever more at once.
  held.chunk, held.from, held.size = {}, 0, 1
  return held
end

local function sliding_log_find(held, window)
  for at = 1, #held, 3 do
    if held[at] == window then
      return at
    end
  end
end

local function sliding_log_entry(held, index)
  local entry = held.chunk[index - held.from + 1]
  if index < held.from or not entry then
    held.chunk = redis.call('LRANGE', held.key, index + 1, index + held.size)
    held.from = index
    held.size = math.min(held.size * 8, 1024)
    entry = held.chunk[1]
  end
  return cmsgpack.unpack(entry)
end

local function sliding_log_decide(held, at, fresh, now, cost, window, amount)
  local length = sliding_log_length(window)
  local used, head = 0, held.entries
  if at then
    used, head = held[at + 1], held[at + 2]
    if head < held.entries then
      now = math.max(now, held.last)
    end
    local first = head
    if head < held.entries and held.last <= now - length then
      used, head = 0, held.entries
    end
    while head < held.entries do
      local moment, freed = sliding_log_entry(held, head)
      if moment > now - length then
        break
      end
      used, head = used - freed, head + 1
    end
    held.advanced = held.advanced + head - first
    held[at + 1], held[at + 2] = used, head
  end
  local free = amount - used
  local live = head < held.entries
  if cost <= free or cost == 0 then
    local n = #fresh
    fresh[n + 1], fresh[n + 2], fresh[n + 3] = window, used + cost, head
    local reset = cost > 0 and length or live and held.last + length - now or 0
    return true, math.max(free - cost, 0), reset, 0
  end
  local reset = live and held.last + length - now or 0
  if cost > amount then
    return false, math.max(free, 0), reset, -1
  end
  local needed = cost - free
  local moment, freed
  for index = head, math.min(head + LOOK_AHEAD, held.entries) - 1 do
    moment, freed = sliding_log_entry(held, index)
    needed = needed - freed
    if needed <= 0 then
      break
    end
  end
  return false, math.max(free, 0), reset, moment + length - now
end

-- Writes the header, and drops the entries that count for no window. The entry before the first kept one gives its place to it.
local function sliding_log_write(held, states)
  local dead = held.entries
  for at = 1, #states, 3 do
    dead = math.min(dead, states[at + 2])
  end
  for at = 1, #states, 3 do
    states[at + 2] = states[at + 2] - dead
  end
  if dead > 0 then
    redis.call('LTRIM', held.key, dead, -1)
  end
  redis.call('LSET', held.key, 0, cmsgpack.pack(held.last, unpack(states)))
end

local function sliding_log_save(key, held, fresh, ttl, now, cost)
  held.last = held.last and math.max(held.last, now) or now
  if held.entries == 0 then
    redis.call('DEL', key)
    for at = 1, #fresh, 3 do
      fresh[at + 2] = 0
    end
    redis.call('RPUSH', key, cmsgpack.pack(held.last, unpack(fresh)), cmsgpack.pack(held.last, cost))
  else
    redis.call('RPUSH', key, cmsgpack.pack(held.last, cost))
    sliding_log_write(held, fresh)
  end
  redis.call('PEXPIRE', key, ttl)
end

-- What was looked at and found dead is dropped even where nothing is charged, so that no check looks at it again.
local function sliding_log_tidy(held)
  if held.advanced > TIDY then
    local states = {unpack(held)}
    sliding_log_write(held, states)
  end
end

-- Entries of elsewhere are put in their places: `others` has for each window of `config` its entries, [moment, cost, ...], or false.
local function sliding_log_absorb(key, config, others, now)
  local held = sliding_log_load(key)
  local costs, moments = {}, {}
  local function add(moment, cost)
    if not costs[moment] then
      costs[moment] = 0
      moments[#moments + 1] = moment
    end
    costs[moment] = costs[moment] + cost
  end
  for index = 0, held.entries - 1 do
    add(sliding_log_entry(held, index))
  end
  local longest, widest = nil, 0
  for i = 2, #config, 2 do
    local other = others[i / 2]
    if other and sliding_log_length(config[i]) > widest then
      longest, widest = other, sliding_log_length(config[i])
    end
  end
  -- One admission is in all windows alike, so the longest window's entries are all there are.
  for i = 1, longest and #longest or 0, 2 do
    add(longest[i], longest[i + 1])
  end
  local windows, known, length = {}, {}, 0
  local function name(window)
    if not known[window] then
      known[window] = true
      windows[#windows + 1] = window
      length = math.max(length, sliding_log_length(window))
    end
  end
  for i = 2, #config, 2 do
    name(config[i])
  end
  for at = 1, #held, 3 do
    name(held[at])
  end
  table.sort(moments)
  local kept = {}
  for _, moment in ipairs(moments) do
    if costs[moment] > 0 and moment > now - length then
      kept[#kept + 1] = moment
    end
  end
  redis.call('DEL', key)
  if #kept == 0 then
    return
  end
  local header = {kept[#kept]}
  for _, window in ipairs(windows) do
    local used, head = 0, 0
    for _, moment in ipairs(kept) do
      if moment > now - sliding_log_length(window) then
        used = used + costs[moment]
      else
        head = head + 1
      end
    end
    header[#header + 1], header[#header + 2], header[#header + 3] = window, used, head
  end
  redis.call('RPUSH', key, cmsgpack.pack(unpack(header)))
  for from = 1, #kept, 1000 do
    local entries = {}
    for i = from, math.min(from + 999, #kept) do
      entries[#entries + 1] = cmsgpack.pack(kept[i], costs[kept[i]])
    end
    redis.call('RPUSH', key, unpack(entries))
  end
  redis.call('PEXPIRE', key, math.max(math.ceil((kept[#kept] + length - now) / 1000), 1))
end

-- Reads every entry; fails where one cannot be read.
local function sliding_log_verify(held)
  for index = 0, held.entries - 1 do
    local moment, cost = sliding_log_entry(held, index)
    local _ = moment + cost
  end
end

algorithms.sliding_log = {
  parameters = 2, load = sliding_log_load, find = sliding_log_find, decide = sliding_log_decide, save = sliding_log_save,
  tidy = sliding_log_tidy, absorb = sliding_log_absorb, verify = sliding_log_verify,
}

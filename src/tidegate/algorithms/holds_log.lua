-- Twin of `give_back` of holds.py for logs: units leave the entry that they were charged with.

local LAST_ENTRIES = 8

local function log_entry(key, index)
  return cmsgpack.unpack(redis.call('LINDEX', key, index))
end

-- Writes the head of a log after units left it. What was read of its entries may have changed.
local function save_log(key, held)
  held.chunk = {}
  while held.entries > 0 do
    local moment, cost = log_entry(key, -1)
    if cost > 0 then
      held.last = moment
      break
    end
    redis.call('LTRIM', key, 0, -2)
    held.entries = held.entries - 1
  end
  if held.entries == 0 then
    redis.call('DEL', key)
    return
  end
  for at = 1, #held, 3 do
    held[at + 2] = math.min(held[at + 2], held.entries)
  end
  redis.call('LSET', key, 0, cmsgpack.pack(held.last, unpack(held)))
end

-- The first entry of a moment or a later one. Most holds are settled while theirs is among the last.
local function log_place(key, held, charged_at)
  local low, high = 0, held.entries
  local last = redis.call('LRANGE', key, math.max(high - LAST_ENTRIES, 0) + 1, -1)
  while #last > 0 and cmsgpack.unpack(last[#last]) >= charged_at do
    high, last[#last] = high - 1, nil
  end
  if #last > 0 then
    return high
  end
  while low < high do
    local middle = math.floor((low + high) / 2)
    local moment = log_entry(key, middle + 1)
    if moment < charged_at then
      low = middle + 1
    else
      high = middle
    end
  end
  return low
end

-- Entries in the middle stay without units; those at the end go, because the last one says when all is over.
algorithms.sliding_log.back = function(key, held, _, units, record)
  local charged_at = record[2]
  local low = log_place(key, held, charged_at)
  local rest = units
  while rest > 0 and low < held.entries do
    local moment, cost = log_entry(key, low + 1)
    if moment ~= charged_at then
      break
    end
    local part = math.min(cost, rest)
    redis.call('LSET', key, low + 1, cmsgpack.pack(moment, cost - part))
    for at = 1, #held, 3 do
      if held[at + 2] <= low then
        held[at + 1] = held[at + 1] - part
      end
    end
    rest, low = rest - part, low + 1
  end
  if rest < units then
    save_log(key, held)
  end
end

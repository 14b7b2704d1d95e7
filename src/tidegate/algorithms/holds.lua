-- Twin of holds.py. The functions are made only by scripts that need them: Redis makes those of a script on each call.
-- A record is what a hold charged to a counter, in MessagePack: units, moment; of a bucket, for each window its name and its level in
-- whole tokens just after.

local function hold_functions()
  local UNBOUNDED = 1125899906842624
  local REFUND_ENTRIES = 1000
  local LAST_ENTRIES = 8

  local function algorithm_name(config)
    return algorithms[config[1]] and config[1] or string.sub(config[1], 6)
  end

  local function find(held, width, window)
    for at = 1, #held, width do
      if held[at] == window then
        return at
      end
    end
  end

  -- Adds to a record of a bucket the level of each window, in whole tokens without leased units.
  local function bucket_levels(record, held, config)
    for i = 2, #config, 4 do
      local at = algorithms.token_bucket.find(held, config[i])
      if at then
        local _, leased, _, later = bucket_live_leases(held, held[at + 4])
        record[#record + 1], record[#record + 2] = config[i], divide(held[at + 1], held[at + 2]) - leased - later
      end
    end
  end

  local function back_to_windows(held, config, width, units, charged_at)
    for i = 2, #config, 2 do
      local window = config[i]
      local at = find(held, width, window)
      local start = window <= 0 and calendar_bounds(charged_at, window) or charged_at - fmod(charged_at, window * 1000000)
      start = start / 1000000
      if at and held[at + 1] == start then
        held[at + 2] = math.max(held[at + 2] - units, 0)
      elseif at and width == 4 and start < held[at + 1] then
        local before = window <= 0 and calendar_bounds(held[at + 1] * 1000000 - 1, window) / 1000000 or held[at + 1] - window
        if before == start then
          held[at + 3] = math.max(held[at + 3] - units, 0)
        end
      end
    end
  end

  local function back_to_quota(held, config, units, charged_at)
    local second = divide(charged_at, 1000000)
    for i = 2, #config, 4 do
      local at = find(held, 3, config[i])
      if at and second <= held[at + 1] and second * 1000000 >= quota_period(held[at + 1] * 1000000, config[i + 3]) then
        held[at + 2] = math.max(held[at + 2] - units, 0)
      end
    end
  end

  local function back_to_bucket(held, units, record)
    for i = 3, #record, 2 do
      local at = find(held, 5, record[i])
      if at then
        local scale, rate = held[at + 2], held[at + 3]
        local moment = math.max(now, held[at + 4])
        local returned = math.min(units * scale, record[i + 1] * scale - (moment - record[2]) * rate)
        if returned > 0 then
          local level = bucket_level(held, at, moment, scale, rate)
          local _, leased, _, later = bucket_live_leases(held, moment)
          -- Leased units stay: an instance may use them.
          held[at + 1] = math.max(level - returned, math.min(level, (leased + later) * scale))
          held[at + 4] = moment
        end
      end
    end
  end

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
  local function back_to_log(key, held, units, charged_at)
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

  -- The latest entries first; a bounded number of them.
  local function refund_to_log(key, held, units)
    local rest, steps = units, 0
    while rest > 0 and held.entries > 0 and steps < REFUND_ENTRIES do
      local moment, cost = log_entry(key, -1)
      local part = math.min(cost, rest)
      for at = 1, #held, 3 do
        if held[at + 2] < held.entries then
          held[at + 1] = held[at + 1] - part
        end
      end
      rest, steps = rest - part, steps + 1
      if part < cost then
        redis.call('LSET', key, -1, cmsgpack.pack(moment, cost - part))
      else
        redis.call('LTRIM', key, 0, -2)
        held.entries = held.entries - 1
      end
    end
    if rest < units then
      save_log(key, held)
    end
  end

  -- Returns units of a record that were not used. A counter that was reset since does not contain them any more.
  local function give_back(key, config, units, record)
    local reset_at = units > 0 and redis.call('GET', key .. '.reset')
    if units <= 0 or (reset_at and tonumber(reset_at) >= record[2]) then
      return
    end
    local name = algorithm_name(config)
    if name == 'concurrent' or name == 'failures' then
      return
    end
    local held = algorithms[name].load(key)
    if name == 'sliding_log' then
      back_to_log(key, held, units, record[2])
    elseif #held > 0 then
      if name == 'token_bucket' then
        back_to_bucket(held, units, record)
      elseif name == 'quota' then
        back_to_quota(held, config, units, record[2])
      else
        back_to_windows(held, config, name == 'sliding_window' and 4 or 3, units, record[2])
      end
      redis.call('SET', key, cmsgpack.pack(unpack(held)), 'KEEPTTL')
    end
  end

  -- Returns units that no hold charged: at most what counts now.
  local function refund(key, config, units)
    local name, record = algorithm_name(config), {units, now}
    if algorithms[name].settle then
      return
    end
    if name == 'sliding_log' then
      refund_to_log(key, algorithms.sliding_log.load(key), units)
      return
    elseif name == 'token_bucket' then
      bucket_levels(record, algorithms.token_bucket.load(key), config)
    end
    give_back(key, config, units, record)
  end

  -- Charges units whatever the limits say.
  local function charge(key, config, cost)
    local name = algorithm_name(config)
    local algorithm = algorithms[name]
    if algorithm.settle then
      algorithm.settle(key, config, cost, false)
      return
    end
    local held, fresh, longest = algorithm.load(key), {}, 0
    for i = 2, #config, algorithm.parameters do
      local window, most = config[i], config[i + 2]
      if name == 'quota' then
        most = UNBOUNDED
      end
      local unbounded = name == 'token_bucket' and MAX_EXACT or UNBOUNDED
      local _, _, reset = algorithm.decide(
        held, algorithm.find(held, window), fresh, now, cost, window, unbounded, most, config[i + 3])
      longest = math.max(longest, reset)
    end
    if name == 'token_bucket' then
      for at = 2, #fresh, 5 do
        fresh[at] = math.min(fresh[at], MAX_EXACT)
      end
    end
    algorithm.save(key, held, fresh, math.ceil(longest / 1000), now, cost)
  end

  return {give_back = give_back, refund = refund, charge = charge, bucket_levels = bucket_levels}
end

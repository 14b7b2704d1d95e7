-- Twin of `refund` of holds.py: returns units that no hold charged, at most what counts now.

local REFUND_ENTRIES = 1000

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

local function refund(key, config, units, give_back)
  local name, record = algorithms[config[1]] and config[1] or string.sub(config[1], 6), {units, now}
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

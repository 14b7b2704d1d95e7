-- Twin of `give_back` of holds.py: returns units of a record that were not used. A record is what a hold charged to a counter, in MessagePack:
-- units, moment; of a bucket, for each window its name and its level in whole tokens just after.

local function give_back(key, config, units, record)
  local algorithm = algorithms[config[1]] or algorithms[string.sub(config[1], 6)]
  -- Slots, and failures, are the holds themselves.
  if units > 0 and algorithm.back then
    -- A counter that was reset since does not contain them any more.
    local reset_at = redis.call('GET', key .. '.reset')
    if not reset_at or tonumber(reset_at) < record[2] then
      algorithm.back(key, algorithm.load(key), config, units, record)
    end
  end
end

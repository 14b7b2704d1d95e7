-- The first script that needs the units of expired holds returns them: one that opens or ends a hold, a check that is denied without them,
-- or one of cost 0.
local RECLAIM_STEPS = 100

-- Returns the units of expired holds to a counter. Whether there were any, and when the next hold expires; nil for none.
local function reclaim(key, config)
  local holds = key .. '.holds'
  -- Where Redis does not allow the command, holds are not in use.
  local done, first = pcall(redis.call, 'ZRANGE', holds, 0, 0, 'WITHSCORES')
  if not done or not first[1] then
    return false
  end
  local next_end = tonumber(first[2])
  if next_end > now then
    return false, next_end
  end
  local give_back = give_back_function()
  local due = redis.call('ZRANGE', holds, 0, RECLAIM_STEPS, 'WITHSCORES')
  next_end = nil
  for i = 1, #due, 2 do
    local ends = tonumber(due[i + 1])
    if ends > now or i > 2 * RECLAIM_STEPS then
      next_end = math.max(ends, now)
      break
    end
    local record = {cmsgpack.unpack(string.sub(due[i], HOLD_ID + 1))}
    give_back(key, config, record[1], record)
    redis.call('ZREM', holds, due[i])
    redis.call('SET', ended_key(key, string.sub(due[i], 1, HOLD_ID)), 'expired', 'PX', ENDED_KNOWN)
  end
  return true, next_end
end

local decide_once = decide

-- As decide.lua, with the units of expired holds where they are missing. A denial lasts until the next hold expires, at most.
local function decide(keys, configs, cost)
  local binding, least, reset, retry, at = decide_once(keys, configs, cost)
  if binding > 0 and cost > 0 then
    return binding, least, reset, retry, at, left
  end
  local any, next_end = false, nil
  for k = 1, #keys do
    local found, ends = reclaim(keys[k], configs[k])
    any = any or found
    if ends and (not next_end or ends < next_end) then
      next_end = ends
    end
  end
  if any then
    binding, least, reset, retry, at = decide_once(keys, configs, cost)
  end
  if next_end and binding < 0 and retry > 0 then
    retry = math.max(math.min(retry, next_end - now), 1)
  end
  return binding, least, reset, retry, at, left
end

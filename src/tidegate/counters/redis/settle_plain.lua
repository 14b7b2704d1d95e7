-- Ends a hold in the common case: it is open, no hold of its counters has expired, they count no failures, none is soft or has slots, and
-- no more was used than was reserved. Everything else goes on to settle_hold.lua, whose functions are not made here.
local count = #KEYS
local id, used = ARGV[2 * count + 1], tonumber(ARGV[2 * count + 2])
local configs, plain = {}, true

local function member(k)
  return id .. ARGV[count + k]
end

local ends, due = nil, false
for k = 1, count do
  local holds = KEYS[k] .. '.holds'
  local first = redis.call('ZRANGE', holds, 0, 0, 'WITHSCORES')
  if first[1] then
    due = due or tonumber(first[2]) <= now
    -- A record of a soft limit that charged nothing is empty.
    if not ends and ARGV[count + k] ~= '' then
      ends = first[1] == member(k) and first[2] or redis.call('ZSCORE', holds, member(k))
    end
  end
end

if ends and not due then
  local records = {}
  for k = 1, count do
    configs[k] = cmsgpack.unpack(ARGV[k])
    local algorithm, record = algorithms[configs[k][1]], ARGV[count + k]
    records[k] = record ~= '' and {cmsgpack.unpack(record)} or {-1}
    plain = plain and algorithm and algorithm.back and used <= records[k][1]
  end
  if plain then
    local place, binding, least, reset_after, over = 0, 0, -1, 0, 0
    for k = 1, count do
      local key, config, record = KEYS[k], configs[k], records[k]
      local algorithm, held = algorithms[config[1]], nil
      if redis.call('ZREM', key .. '.holds', member(k)) == 1 and used < record[1] then
        -- A counter that was reset since does not contain the units any more.
        local reset_at = redis.call('GET', key .. '.reset')
        held = algorithm.load(key)
        if not reset_at or tonumber(reset_at) < record[2] then
          algorithm.back(key, held, config, record[1] - used, record)
        end
      else
        held = algorithm.load(key)
      end
      -- What remains, as a check of cost 0 says it.
      local fresh = {}
      for i = 2, #config, algorithm.parameters do
        local _, remaining, reset = algorithm.decide(
          held, algorithm.find(held, config[i]), fresh, now, 0, config[i], config[i + 1], config[i + 2], config[i + 3])
        place = place + 1
        if remaining < 0 then
          over, remaining = math.max(over, -remaining), 0
        end
        if remaining < least or least < 0 then
          binding, least, reset_after = place, remaining, reset
        end
      end
      if algorithm.tidy then
        algorithm.tidy(held)
      end
    end
    local known = math.max(math.ceil((tonumber(ends) - now) / 1000), SETTLED_KNOWN)
    redis.call('SET', ended_key(KEYS[1], id), cmsgpack.pack(used, 0), 'PX', known)
    return {1, used, tonumber(ends), binding, over > 0 and -over or least, reset_after, 0, now}
  end
end

-- Opens a hold in the common case: counters of windows, logs and buckets, none of them soft, with no expired holds, and the cost passes.
-- Everything else goes on to hold.lua, whose functions are not made here: that would cost more than all this.
local configs, open, cost = {}, {}, tonumber(ARGV[#KEYS + 1])
local ttl, most = unpack(cmsgpack.unpack(ARGV[#KEYS + 3]))
-- Where `left` is wanted, hold.lua gives it.
local plain = cost > 0 and not left
for k = 1, #KEYS do
  local config = cmsgpack.unpack(ARGV[k])
  local algorithm = algorithms[config[1]]
  configs[k] = config
  plain = plain and algorithm and config[1] ~= 'concurrent' and config[1] ~= 'failures'
  if plain then
    open[k] = redis.call('ZCARD', KEYS[k] .. '.holds')
    plain = open[k] == 0 or (open[k] < most and tonumber(redis.call('ZRANGE', KEYS[k] .. '.holds', 0, 0, 'WITHSCORES')[2]) > now)
  end
end

-- Adds a hold to those of a counter. `longest`: for how many microseconds what it charged counts. Gives its record.
local function file_hold(key, algorithm, config, fresh, longest, count)
  local holds, record = key .. '.holds', nil
  if algorithm == algorithms.token_bucket and cost > 0 then
    record = {cost, now}
    bucket_levels(record, fresh, config)
    record = cmsgpack.pack(unpack(record))
  else
    record = cmsgpack.pack(cost, now)
  end
  redis.call('ZADD', holds, string.format('%.0f', now + ttl), ARGV[#KEYS + 2] .. record)
  -- As long as the units count, a later settlement may give them back. The state of a quota is kept for longer than it counts.
  local counts = cost > 0 and math.ceil(longest / 1000) or 0
  if algorithm == algorithms.quota then
    counts = redis.call('PTTL', key)
  end
  local kept = math.max(counts, math.ceil(ttl / 1000) + ENDED_KNOWN)
  if count == 0 or redis.call('PTTL', holds) < kept then
    redis.call('PEXPIRE', holds, kept)
  end
  return record
end

if plain then
  local states, place, binding, least, reset_after = {}, 0, 0, -1, 0
  for k = 1, #KEYS do
    local config = configs[k]
    local algorithm, fresh, longest = algorithms[config[1]], {}, 0
    local held = algorithm.load(KEYS[k])
    for i = 2, #config, algorithm.parameters do
      local allowed, remaining, reset = algorithm.decide(
        held, algorithm.find(held, config[i]), fresh, now, cost, config[i], config[i + 1], config[i + 2], config[i + 3])
      plain = plain and allowed and remaining >= 0
      place = place + 1
      if remaining < least or least < 0 then
        binding, least, reset_after = place, remaining, reset
      end
      if reset > longest then
        longest = reset
      end
    end
    states[k] = {algorithm, held, fresh, longest}
  end
  if plain then
    local answer = {binding, least, reset_after, 0, now}
    for k = 1, #KEYS do
      local algorithm, held, fresh, longest = unpack(states[k])
      algorithm.save(KEYS[k], held, fresh, math.ceil(longest / 1000), now, cost)
      answer[5 + k] = file_hold(KEYS[k], algorithm, configs[k], fresh, longest, open[k])
    end
    return answer
  end
end

-- Cancels a reservation whose moment has not come. KEYS: its counters, then for each the key that says when it was reset. ARGV: for each
-- counter its algorithm and parameters as in charge.lua; then the cost, when it was reserved and the moment.
-- A counter that was reset since does not contain the units any more. Answers how many of its limits have all units available again.
-- One more key at the end is where the reservation is remembered: what it says of the moments counts, and it remembers the answer, which
-- is the same the second time. Where it is not there before the moment: -1.
local count = math.floor(#KEYS / 2)
local cost, reserved_at, moment = tonumber(ARGV[count + 1]), tonumber(ARGV[count + 2]), tonumber(ARGV[count + 3])
local whole = 0
if now >= moment then
  return 0
end
local remembered = KEYS[2 * count + 1]
if remembered then
  local record = redis.call('GET', remembered)
  if not record then
    return -1
  end
  local known = cmsgpack.unpack(record)
  if known[3] then
    return known[3]
  end
  reserved_at, moment = known[1], known[2]
end
local loaded, last = {}, true
for k = 1, count do
  local config, reset_at = cmsgpack.unpack(ARGV[k]), redis.call('GET', KEYS[count + k])
  local name, algorithm = config[1], algorithms[config[1]]
  local one = {config, algorithm.load(KEYS[k]), {}}
  loaded[k] = one
  for i = 2, #config, algorithm.parameters do
    local at = algorithm.find(one[2], config[i])
    if at then
      last = last and not is_followed(name, one[2], at, now, moment, config, i)
      if not (reset_at and tonumber(reset_at) >= reserved_at) then
        one[3][i] = at
      end
    end
  end
end
for k = 1, count do
  local config, held, changed = loaded[k][1], loaded[k][2], false
  local name, algorithm = config[1], algorithms[config[1]]
  for i = 2, #config, algorithm.parameters do
    local at = loaded[k][3][i]
    if at then
      local units = 0
      if name ~= 'token_bucket' then
        units = release_window(name, held, at, moment, cost, config[i])
      elseif last then
        units = release_bucket(held, at, now, cost, config[i + 2], config[i + 3])
      end
      changed = changed or units > 0
      whole = whole + (units == cost and 1 or 0)
    end
  end
  if changed then
    redis.call('SET', KEYS[k], cmsgpack.pack(unpack(held)), 'KEEPTTL')
  end
end
if remembered then
  redis.call('SET', remembered, cmsgpack.pack({reserved_at, moment, whole}), 'KEEPTTL')
end
return whole

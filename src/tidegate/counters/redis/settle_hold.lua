-- Ends a hold: what it did not use goes back, what it used beyond its cost is charged whatever the limits say. An expired hold has given back
-- everything: all that was used is charged now. KEYS: its counters. ARGV: for each its algorithm and parameters as in charge.lua, then for
-- each its record; then the id, the units used, and 1 where the request succeeded. Where a counter counts failures, the units used say whether
-- it failed, and other counters are charged what the hold reserved.
-- Answers: 0 for an id that is not known, 1 for a hold that ended now, 2 for one that had been settled before; the units charged; 1 where that
-- was after it expired, else 0 or when it would have expired; then what remains, as charge.lua answers a check of cost 0.
-- What goes before: settle_plain.lua.
local ended, known = ended_key(KEYS[1], id), nil

-- From now on a state is loaded once; what is given back changes the loaded one too. Gives those that were loaded, by key.
local function load_once()
  local loaded = {}
  for name, algorithm in pairs(algorithms) do
    local load = algorithm.load
    if name ~= 'concurrent' and name ~= 'failures' then
      algorithm.load = function(key)
        loaded[key] = loaded[key] or load(key)
        return loaded[key]
      end
    end
  end
  return loaded
end

local late = not ends or tonumber(ends) <= now
if late then
  for k = 1, count do
    if k == 1 or ended_key(KEYS[k], id) ~= ended then
      known = known or redis.call('GET', ended_key(KEYS[k], id))
    end
  end
  -- Only from here on it is certain that an instance made this id.
  if not ends and not known then
    return {0}
  end
end
for k = 1, count do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
if known and known ~= 'expired' then
  local charged, was_late = cmsgpack.unpack(known)
  return {2, charged, was_late, decide(KEYS, configs, 0)}
end
-- What is loaded to give units back need not be loaded again to say what remains.
local loaded = load_once()
local give_back
for k = 1, count do
  if ARGV[count + k] ~= '' then
    local record = {cmsgpack.unpack(ARGV[count + k])}
    local own = algorithms.failures and record[1] or used
    local more, unused = own, late and record[1] or record[1] - own
    if redis.call('ZREM', KEYS[k] .. '.holds', member(k)) == 1 then
      more = late and own or -unused
    elseif late then
      unused = 0
    else
      unused, more = 0, 0
    end
    if configs[k][1] == 'failures' then
      algorithms.failures.settle(KEYS[k], configs[k], used, ARGV[2 * count + 3] == '1')
    elseif configs[k][1] ~= 'concurrent' and (unused > 0 or more > 0) then
      give_back = give_back or give_back_function()
      give_back(KEYS[k], configs[k], unused, record)
      if more > 0 then
        charge_beyond(KEYS[k], configs[k], more)
        loaded[KEYS[k]] = nil
      end
    end
  end
end
local remaining = late and math.ceil(ENDED_KNOWN) or math.max(math.ceil((tonumber(ends) - now) / 1000), SETTLED_KNOWN)
redis.call('SET', ended, cmsgpack.pack(used, late and 1 or 0), 'PX', remaining)
local ended_at = late and 1 or tonumber(ends)
if due then
  return {1, used, ended_at, decide(KEYS, configs, 0)}
end
return {1, used, ended_at, decide_once(KEYS, configs, 0)}

-- Ends a hold: what it did not use goes back, what it used beyond its cost is charged whatever the limits say. An expired hold has given back
-- everything: all that was used is charged now. KEYS: its counters. ARGV: for each its algorithm and parameters as in charge.lua, then for
-- each its record; then in MessagePack the id, the units used, and whether the request succeeded. Where a counter counts failures, the units
-- used say whether it failed, and other counters are charged what the hold reserved.
-- Answers: 0 for an id that is not known, 1 for a hold that ended now, 2 for one that had been settled before; the units charged; whether that
-- was after it expired; then what remains, as charge.lua answers a check of cost 0.
local SETTLED_KNOWN = 120000
local count = #KEYS
local id, used, success = unpack(cmsgpack.unpack(ARGV[2 * count + 1]))
local ended, known = ended_key(KEYS[1], id), nil

local function member(k)
  return id .. ARGV[count + k]
end

for k = 1, count do
  if k == 1 or ended_key(KEYS[k], id) ~= ended then
    known = known or redis.call('GET', ended_key(KEYS[k], id))
  end
end
local ends = nil
for k = 1, count do
  -- A record of a soft limit that charged nothing is empty.
  if ARGV[count + k] ~= '' then
    ends = ends or redis.call('ZSCORE', KEYS[k] .. '.holds', member(k))
  end
end
-- Only from here on it is certain that an instance made this id.
if not ends and not known then
  return {0}
end
local configs = {}
for k = 1, count do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
if known and known ~= 'expired' then
  local charged, late = cmsgpack.unpack(known)
  return {2, charged, late, decide(KEYS, configs, 0)}
end
local functions = hold_functions()
local late = known or tonumber(ends) <= now
for k = 1, count do
  if ARGV[count + k] ~= '' then
    local record = {cmsgpack.unpack(ARGV[count + k])}
    local own = algorithms.failures and record[1] or used
    local more = own
    if redis.call('ZREM', KEYS[k] .. '.holds', member(k)) == 1 then
      functions.give_back(KEYS[k], configs[k], late and record[1] or record[1] - own, record)
      more = late and own or own - record[1]
    elseif not late then
      more = 0
    end
    if configs[k][1] == 'failures' then
      algorithms.failures.settle(KEYS[k], configs[k], used, success)
    elseif more > 0 and configs[k][1] ~= 'concurrent' then
      functions.charge(KEYS[k], configs[k], more)
    end
  end
end
local remaining = late and math.ceil(ENDED_KNOWN) or math.max(math.ceil((tonumber(ends) - now) / 1000), SETTLED_KNOWN)
redis.call('SET', ended, cmsgpack.pack(used, late and 1 or 0), 'PX', remaining)
return {1, used, late and 1 or 0, decide(KEYS, configs, 0)}

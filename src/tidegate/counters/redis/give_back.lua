-- Gives up a lease. KEYS: its counters, then for each the key that says when it was reset. ARGV: for each counter its algorithm and parameters
-- as in charge.lua; then in MessagePack the units leased, how many are unused, when they were charged and when the lease ends.
-- A counter that was reset since does not contain the units any more. Answers how many counters took them back.
local count = #KEYS / 2
local units, unused, charged_at, ends = unpack(cmsgpack.unpack(ARGV[count + 1]))
local taken = 0
for k = 1, count do
  local reset_at = redis.call('GET', KEYS[count + k])
  if not reset_at or tonumber(reset_at) < charged_at then
    if lease_give_back(KEYS[k], cmsgpack.unpack(ARGV[k]), now, units, unused, charged_at, ends) then
      taken = taken + 1
    end
  end
end
return taken

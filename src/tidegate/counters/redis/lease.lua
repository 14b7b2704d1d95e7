-- One check that asks for a lease: where it passes, units are charged in advance in the same step. KEYS and ARGV as in charge.lua; then
-- in MessagePack the units wanted, the divisor of what remains, and the life of the lease in microseconds.
-- Answers as charge.lua does, but for the reset, which counts the leased units; then the units and the moment at which the lease ends, 0 for none;
-- and `left`, which counts the leased units as used. Where so little is left that the same cost cannot pass now, the moment is instead the
-- denial of such a check: which limit, what is left, until it is replenished, until the cost passes.
local configs = {}
for k = 1, #KEYS do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
local cost = tonumber(ARGV[#KEYS + 1])
local want, divisor, life = unpack(cmsgpack.unpack(ARGV[#KEYS + 2]))
local binding, least, reset, retry, at = decide(KEYS, configs, cost)
local units = binding > 0 and math.min(want, (divide(least, divisor))) or 0
for k = 1, #KEYS do
  life = lease_life(configs[k], now, life)
end
if units < 1 and binding > 0 and least >= 0 and least < cost then
  -- The limits of leases are not soft, so this is denied, and writes nothing.
  local left_before = left
  local denied_by, remaining, replenished, passes = decide(KEYS, configs, cost)
  return {binding, least, reset, retry, at, 0, {-denied_by, remaining, replenished, passes}, left_before}
end
if units < 1 or life < MIN_LIFE then
  return {binding, least, reset, retry, at, 0, 0, left}
end
local _, _, reset_with_lease = decide(KEYS, configs, units)
for k = 1, #KEYS do
  lease_hold(KEYS[k], configs[k], now, units, now + life)
end
return {binding, least, reset_with_lease, retry, at, units, now + life, left}

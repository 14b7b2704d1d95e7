-- One check that asks for a lease: where it passes, units are charged in advance in the same step. KEYS and ARGV as in charge.lua; then
-- in MessagePack the units wanted, the divisor of what remains, the life of the lease in microseconds, and the units wanted of those that come
-- free later.
-- Answers as charge.lua does, but for the reset, which counts the leased units; then the units and the moment at which the lease ends, 0 for none;
-- and `left`, which counts the leased units as used. Where the same cost cannot pass now, the moment is instead the denial of such a check:
-- which limit, what is left, until it is replenished, until the cost passes; and, where units were leased that come free later, how many,
-- when the lease ends, and the units in the window, those in the one before, and the start of the window, before they were charged.
local configs = {}
for k = 1, #KEYS do
  configs[k] = cmsgpack.unpack(ARGV[k])
end
local cost = tonumber(ARGV[#KEYS + 1])
local want, divisor, life, ahead = unpack(cmsgpack.unpack(ARGV[#KEYS + 2]))
local binding, least, reset, retry, at = decide(KEYS, configs, cost)
local units = binding > 0 and math.min(want, (divide(least, divisor))) or 0
for k = 1, #KEYS do
  life = lease_life(configs[k], now, life)
end
-- The limits of leases are not soft: a cost above what is left is denied, and writes nothing.
if cost > 0 and (binding < 0 or (least >= 0 and least < cost)) then
  local left_after = left
  if left then
    left = {}
  end
  local granted, ends, current, previous, start = 0, 0, 0, 0, 0
  if #KEYS == 1 and configs[1][1] == 'sliding_window' and #configs[1] == 3 and configs[1][2] > 0 and ahead > 0 then
    decide(KEYS, configs, 0)
    granted, ends, current, previous, start = lease_ahead(KEYS[1], configs[1], decided[1][3], now, ahead, life)
  end
  local denied_by, remaining, replenished, passes = decide(KEYS, configs, cost)
  return {binding, least, reset, retry, at, 0,
    {-denied_by, remaining, replenished, passes, granted, ends, current, previous, start}, left_after}
end
if units < 1 or life < MIN_LIFE then
  return {binding, least, reset, retry, at, 0, 0, left}
end
local _, _, reset_with_lease = decide(KEYS, configs, units)
for k = 1, #KEYS do
  lease_hold(KEYS[k], configs[k], now, units, now + life)
end
return {binding, least, reset_with_lease, retry, at, units, now + life, left}

-- Exact integers in doubles: every value here is a whole number below 2^53, and no step leaves that range.

local fmod = math.fmod

-- floor(a / b) and the rest, for a >= 0 and b > 0. Plain a / b would round up just below a multiple.
local function divide(a, b)
  local rest = fmod(a, b)
  return (a - rest) / b, rest
end

local function divide_up(a, b)
  local rest = fmod(a, b)
  return (a - rest) / b + (rest > 0 and 1 or 0)
end

-- floor(a * b / c) and the rest, where a * b may be beyond 2^53: long division, seven bits of a at a time.
-- b and c stay below 2^45 (a year in microseconds), so 128 * rest + 127 * b stays below 2^53.
local function multiply_divide(a, b, c)
  local product = a * b
  if product <= 9007199254740992 then
    return divide(product, c)
  end
  local unit = 1
  while unit * 128 <= a do
    unit = unit * 128
  end
  local quotient, rest = 0, 0
  while unit >= 1 do
    local low = fmod(a, unit)
    local part = rest * 128 + (a - low) / unit * b
    rest = fmod(part, c)
    quotient = quotient * 128 + (part - rest) / c
    a = low
    unit = unit / 128
  end
  return quotient, rest
end

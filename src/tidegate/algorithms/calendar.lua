-- UTC calendar months and years in microseconds since the epoch, as calendar.py has them.

local DAY = 86400000000

local function days_from_civil(year, month)
  -- Days from 1970-01-01 to the first of a month: Howard Hinnant, "chrono-compatible low-level date algorithms", 2013.
  if month <= 2 then
    year = year - 1
    month = month + 12
  end
  local era = math.floor(year / 400)
  local of_era = year - era * 400
  local of_year = math.floor((153 * (month - 3) + 2) / 5)
  return era * 146097 + of_era * 365 + math.floor(of_era / 4) - math.floor(of_era / 100) + of_year - 719468
end

-- Start (inside) and end (outside) of the calendar window that holds a moment: of the month (window 0) or of the year (window -1).
local function calendar_bounds(now, window)
  local days = math.floor(now / DAY) + 719468
  local era = math.floor(days / 146097)
  local of_era = days - era * 146097
  local year = math.floor(
    (of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365
  )
  local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local march = math.floor((5 * of_year + 2) / 153)
  local month = march < 10 and march + 3 or march - 9
  year = year + era * 400 + (month <= 2 and 1 or 0)
  if window == -1 then
    return days_from_civil(year, 1) * DAY, days_from_civil(year + 1, 1) * DAY
  end
  local following = month == 12 and days_from_civil(year + 1, 1) or days_from_civil(year, month + 1)
  return days_from_civil(year, month) * DAY, following * DAY
end

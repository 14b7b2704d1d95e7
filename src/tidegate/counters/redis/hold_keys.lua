-- Holds of a counter lie beside it in a sorted set, <counter>.holds, by the moment at which they expire; a member is the 12 bytes of the id
-- and the record of holds.lua. A hold that has ended is known by its id for some time: tg:{subject}ended.<id>.
local HOLD_ID = 12
local SETTLED_KNOWN = 120000
local ENDED_KNOWN = 3600000

local function ended_key(key, id)
  return string.match(key, '^[^}]*}') .. 'ended.' .. id
end

-- Counters whose states are a few numbers: all windows of a rule in one string, [window, state...] after another, MessagePack.
-- A window is named by its seconds, a calendar month by 0, a year by -1; so a rule that gains or loses a window keeps what the others hold.
-- Moments that are whole seconds are kept in seconds: five bytes instead of nine.

local function packed_load(key)
  local value = redis.call('GET', key)
  return value and {cmsgpack.unpack(value)} or {}
end

-- Decides on the state of a window that is reserved and has not begun: its start is below 0. Until it begins nothing passes.
local function decide_reserved(decide, held, at, fresh, now, cost, ...)
  local start, n = -held[at + 1], #fresh
  local begins = start * 1000000
  held[at + 1] = start
  local allowed, remaining, reset, retry
  if now >= begins then
    allowed, remaining, reset, retry = decide(held, at, fresh, now, cost, ...)
  else
    local _, _, empty = decide(held, at, fresh, begins, 0, ...)
    fresh[n + 2] = -start
    allowed, remaining, reset, retry = cost == 0, 0, begins - now + empty, 0
    if not allowed then
      for i = #fresh, n + 1, -1 do
        fresh[i] = nil
      end
      local _, _, _, later = decide(held, at, {}, begins, cost, ...)
      retry = later < 0 and -1 or begins - now + later
    end
  end
  held[at + 1] = -start
  return allowed, remaining, reset, retry
end

-- `carried` names an entry that is no window's and stays whatever is charged. `kept` has for a window how long its state is kept
-- at least, ms. Both are optional, and so are the entries of `kept`.
local function packed(name, width, parameters, decide, merge, carried, kept)
  local load = packed_load

  -- Where the state of a window begins in what was loaded; nil where it has none.
  local function find(held, window)
    for at = 1, #held, width + 1 do
      if held[at] == window then
        return at
      end
    end
  end

  local function save(key, _, fresh, ttl)
    if kept then
      for at = 1, #fresh, width + 1 do
        local least = kept[fresh[at]]
        if least and least > ttl then
          ttl = least
        end
      end
    end
    redis.call('SET', key, cmsgpack.pack(unpack(fresh)), 'PX', ttl)
  end

  -- Adds states of elsewhere: `others` has for each window of `config` its state, or false.
  local absorb = absorbs and function(key, config, others, now)
    local held, states, longest = load(key), {}, 0
    local extra = carried and find(held, carried)
    if extra then
      states = {unpack(held, extra, extra + width)}
    end
    for i = 2, #config, parameters do
      local window, at = config[i], find(held, config[i])
      local mine, other = nil, others[(i - 2) / parameters + 1]
      if at then
        mine = {unpack(held, at + 1, at + width)}
      end
      if other then
        mine = merge(mine, other, window, config[i + 1], config[i + 2], config[i + 3], held, at)
      end
      if mine then
        states[#states + 1] = window
        for j = 1, width do
          states[#states + 1] = mine[j]
        end
        local _, _, reset = decide(states, #states - width, {}, now, 0, window, config[i + 1], config[i + 2], config[i + 3])
        longest = math.max(longest, reset, kept and kept[window] and kept[window] * 1000 or 0)
      end
    end
    if longest > 0 then
      redis.call('SET', key, cmsgpack.pack(unpack(states)), 'PX', math.ceil(longest / 1000))
    elseif #held > 0 then
      redis.call('DEL', key)
    end
  end

  algorithms[name] = {
    parameters = parameters, width = width, load = load, find = find, decide = decide, save = save, absorb = absorb
  }
end

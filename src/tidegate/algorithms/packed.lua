-- Counters whose states are a few numbers: all windows of a rule in one string, [window, state...] after another, MessagePack.
-- A window is named by its seconds, a calendar month by 0, a year by -1; so a rule that gains or loses a window keeps what the others hold.
-- Moments that are whole seconds are kept in seconds: five bytes instead of nine.

-- `carried` names an entry that is no window's and stays whatever is charged. `kept` has for a window how long its state is kept
-- at least, ms. Both are optional, and so are the entries of `kept`.
local function packed(name, width, parameters, decide, merge, carried, kept)
  local function load(key)
    local value = redis.call('GET', key)
    return value and {cmsgpack.unpack(value)} or {}
  end

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
        ttl = math.max(ttl, kept[fresh[at]] or 0)
      end
    end
    redis.call('SET', key, cmsgpack.pack(unpack(fresh)), 'PX', ttl)
  end

  -- Adds states of elsewhere: `others` has for each window of `config` its state, or false.
  local function absorb(key, config, others, now)
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

  algorithms[name] = {parameters = parameters, load = load, find = find, decide = decide, save = save, absorb = absorb}
end

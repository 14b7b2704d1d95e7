-- Twin of `give_back` of holds.py for windows: units go back only into the window that they were charged in.

local function back_to_windows(name, width)
  algorithms[name].back = function(key, held, config, units, record)
    if #held == 0 then
      return
    end
    local charged_at, find = record[2], algorithms[name].find
    for i = 2, #config, 2 do
      local window = config[i]
      local at = find(held, window)
      local start = window <= 0 and calendar_bounds(charged_at, window) or charged_at - fmod(charged_at, window * 1000000)
      start = start / 1000000
      if at and held[at + 1] == start then
        held[at + 2] = math.max(held[at + 2] - units, 0)
      elseif at and width == 4 and start < held[at + 1] then
        local before = window <= 0 and calendar_bounds(held[at + 1] * 1000000 - 1, window) / 1000000 or held[at + 1] - window
        if before == start then
          held[at + 3] = math.max(held[at + 3] - units, 0)
        end
      end
    end
    redis.call('SET', key, cmsgpack.pack(unpack(held)), 'KEEPTTL')
  end
end

if algorithms.fixed_window then
  back_to_windows('fixed_window', 3)
end
if algorithms.sliding_window then
  back_to_windows('sliding_window', 4)
end

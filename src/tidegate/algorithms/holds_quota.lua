-- Twin of `give_back` of holds.py for quotas: units go back only into the period that they were charged in.

algorithms.quota.back = function(key, held, config, units, record)
  if #held == 0 then
    return
  end
  local second = divide(record[2], 1000000)
  for i = 2, #config, 4 do
    local at = algorithms.quota.find(held, config[i])
    if at and second <= held[at + 1] and second * 1000000 >= quota_period(held[at + 1] * 1000000, config[i + 3]) then
      held[at + 2] = math.max(held[at + 2] - units, 0)
    end
  end
  redis.call('SET', key, cmsgpack.pack(unpack(held)), 'KEEPTTL')
end

-- Twin of `give_back` of holds.py for buckets: of the units those go back that have not drained.

algorithms.token_bucket.back = function(key, held, _, units, record)
  if #held == 0 then
    return
  end
  for i = 3, #record, 2 do
    local at = algorithms.token_bucket.find(held, record[i])
    if at then
      local scale, rate = held[at + 2], held[at + 3]
      local moment = math.max(now, held[at + 4])
      local returned = math.min(units * scale, record[i + 1] * scale - (moment - record[2]) * rate)
      if returned > 0 then
        local level = bucket_level(held, at, moment, scale, rate)
        local _, leased, _, later = bucket_live_leases(held, moment)
        -- Leased units stay: an instance may use them.
        held[at + 1] = math.max(level - returned, math.min(level, (leased + later) * scale))
        held[at + 4] = moment
      end
    end
  end
  redis.call('SET', key, cmsgpack.pack(unpack(held)), 'KEEPTTL')
end

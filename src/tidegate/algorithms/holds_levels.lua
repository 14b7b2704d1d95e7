-- What the record of a bucket's hold has besides: the level of each window, in whole tokens without leased units.

local function bucket_levels(record, held, config)
  for i = 2, #config, 4 do
    local at = algorithms.token_bucket.find(held, config[i])
    if at then
      local _, leased, _, later = bucket_live_leases(held, held[at + 4])
      record[#record + 1], record[#record + 2] = config[i], divide(held[at + 1], held[at + 2]) - leased - later
    end
  end
end

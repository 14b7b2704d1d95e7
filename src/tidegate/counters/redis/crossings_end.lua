end
local left_before = all_left()
return {charge_anyway(), left_before, all_left(), now}

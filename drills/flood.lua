-- For wrk: as many distinct keys as arg[1] says, none of which anybody has; then it ends. Says what was answered.
local asked, answered = 0, 0
local wanted
local statuses = {}

function init(args)
  wanted = tonumber(args[1])
end

function request()
  asked = asked + 1
  return wrk.format("GET", "/v1/authorize", {
    ["X-API-Key"] = string.format("drill-flood-key-%09d", asked),
    ["X-Original-URI"] = "/item",
  })
end

function response(status)
  answered = answered + 1
  statuses[status] = (statuses[status] or 0) + 1
  if answered == wanted then
    local counts = ""
    for each, count in pairs(statuses) do
      counts = counts .. string.format("%d:%d ", each, count)
    end
    io.write("statuses " .. counts .. "\n")
    io.flush()
    os.exit(0) -- a stopped thread alone would leave wrk asleep until its time is over
  end
end

-- Records the state of an instance in one document of all instances, and returns it without those that are gone.
-- KEYS: the document. ARGV: the instance, its state (empty: it leaves), after how many s it counts as gone, how many there may be.
local at = math.floor(now / 1000000)
local stored = redis.pcall('GET', KEYS[1])
local readable, document = pcall(cjson.decode, type(stored) == 'string' and stored or '{}')
local alive, count = {}, 0
for name, each in pairs(readable and type(document) == 'table' and document or {}) do
  if name ~= ARGV[1] and type(each) == 'table' and type(each.at) == 'number' and type(each.state) == 'string'
    and each.at > at - ARGV[3] and count < ARGV[4] - 1 then
    alive[name] = {at = each.at, state = each.state}
    count = count + 1
  end
end
if ARGV[2] ~= '' then alive[ARGV[1]] = {at = at, state = ARGV[2]} end
local text = next(alive) and cjson.encode(alive) or '{}'
redis.call('SET', KEYS[1], text, 'EX', ARGV[3])
return text

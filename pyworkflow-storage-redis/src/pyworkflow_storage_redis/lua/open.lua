-- open: what the store says of itself; with an identity in ARGV[3], one is made if it has none.
local found = call('HMGET', KEYS[1], 'format', 'id')
if not found[2] and ARGV[3] ~= '' then
  call('HSET', KEYS[1], 'format', ARGV[4], 'id', ARGV[3])
  found = { ARGV[4], ARGV[3] }
end
return answer('[' .. (found[1] or 'null') .. ',' .. text_or_null(found[2]) .. ']')

-- recover: release all items that have a token, and move the counter of tokens beyond every one that
-- another copy of this store can have issued.
local found = {}
local function look(key)
  for _, member in ipairs(call('ZRANGE', key, 0, -1)) do
    local run_id, item_id = parse_member(member)
    local it = load_item(run_id, item_id)
    if it and it[TOKEN] then found[#found + 1] = { run_id, item_id } end
  end
end
for _, bucket in ipairs(call('SMEMBERS', P .. 'buckets')) do
  look(P .. 'held:' .. bucket)
  look(P .. 'due:' .. bucket)  -- an item whose lease has ended keeps its token
end
look(P .. 'aside')
serial = serial + 4294967296
for _, one in ipairs(found) do
  local run_id, item_id = one[1], one[2]
  local old = load_item(run_id, item_id)
  if old[TOKEN] then  -- else it was in two places
    local row = call('HMGET', P .. 'run:' .. run_id, 'workflow', 'paused')
    local it = copy(old)
    it[OWNER], it[TOKEN], it[UNTIL], it[RUNG] = false, false, false, false
    it[CLAIMS] = math.max(0, it[CLAIMS] - 1)
    put_item(run_id, item_id, old, it, row[1], row[2])
  end
end
tell_workers()
finish()
return answer('null')

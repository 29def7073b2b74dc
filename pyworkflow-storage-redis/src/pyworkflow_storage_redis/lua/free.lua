-- free, holders, leases: what is leased, of one owner or of all. ARGV[3]: the owner; none: names
-- only. ARGV[4]: list the owner's claims, and free none.
local owner = ARGV[3]
local names, freed = {}, {}
local function look(key)
  for _, member in ipairs(call('ZRANGEBYSCORE', key, '(' .. now_text, '+inf')) do
    local run_id, item_id = parse_member(member)
    local it = load_item(run_id, item_id)
    if it and it[TOKEN] then
      names[it[OWNER]] = true
      if it[OWNER] == owner then freed[#freed + 1] = { run_id, item_id, it } end
    end
  end
end
for _, bucket in ipairs(call('SMEMBERS', P .. 'buckets')) do look(P .. 'held:' .. bucket) end
look(P .. 'aside')
if not owner then
  local texts = {}
  for name in pairs(names) do texts[#texts + 1] = enc(name) end
  return answer('[' .. table.concat(texts, ',') .. ']')
end
if ARGV[4] then
  local texts = {}
  for _, one in ipairs(freed) do
    texts[#texts + 1] = '[' .. enc(one[1]) .. ',' .. enc(one[2]) .. ',' .. enc(one[3][TOKEN]) .. ']'
  end
  return answer('[' .. table.concat(texts, ',') .. ']')
end
for _, one in ipairs(freed) do
  local run_id, item_id, old = one[1], one[2], one[3]
  local row = call('HMGET', P .. 'run:' .. run_id, 'workflow', 'paused')
  local it = copy(old)
  it[UNTIL], it[RUNG] = now_text, false
  if tonumber(it[DUE]) > now then it[DUE] = now_text end
  put_item(run_id, item_id, old, it, row[1], row[2])
end
if #freed > 0 then
  next_serial()
  tell_workers()
  finish()
end
return answer(int(#freed))

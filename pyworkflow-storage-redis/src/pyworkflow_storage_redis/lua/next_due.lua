-- next_due: when an item that fits the filters can be claimed next; writes nothing.
local q = cjson.decode(ARGV[3])
local first
for _, bucket in ipairs(matching(q.queues, q.workflows, nil)) do
  local at = 0
  repeat
    local head = call('ZRANGE', P .. 'due:' .. bucket.name, at, at)[1]
    local it
    if head then
      local run_id, item_id = parse_member(head)
      it = load_item(run_id, item_id)
    end
    local wake
    if it then
      wake = it[DUE]
      -- The clock may have been set back since the lease ended.
      if unexpired(it) and tonumber(it[UNTIL]) > tonumber(wake) then wake = it[UNTIL] end
      if not first or tonumber(wake) < tonumber(first) then first = wake end
    end
    at = at + 1
  until not it or not unexpired(it)
  local held = call('ZRANGE', P .. 'held:' .. bucket.name, 0, 0)[1]
  if held then
    local run_id, item_id = parse_member(held)
    local it = load_item(run_id, item_id)
    if it and (not first or tonumber(it[UNTIL]) < tonumber(first)) then first = it[UNTIL] end
  end
end
return answer(first or 'null')

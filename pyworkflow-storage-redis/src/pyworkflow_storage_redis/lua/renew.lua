-- renew: extend leases. One that ended and was not taken over by anybody is extended as well.
local refs, lease = cjson.decode(ARGV[3]), tonumber(ARGV[4])
local kept, wrote = {}, false
for i, ref in ipairs(refs) do
  local run_id, item_id = ref[1], ref[2]
  local old = load_item(run_id, item_id)
  kept[i] = '0'
  if old and old[TOKEN] and old[TOKEN] == ref[3] then
    local row = call('HMGET', P .. 'run:' .. run_id, 'workflow', 'paused')
    local it = copy(old)
    it[UNTIL] = int(now + lease)
    put_item(run_id, item_id, old, it, row[1], row[2])
    kept[i], wrote = '1', true
  end
end
if wrote then
  next_serial()
  if lease <= 0 then tell_workers() end
  finish()
end
return answer('[' .. table.concat(kept, ',') .. ']')

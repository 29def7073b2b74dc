-- release: give an item back uncounted, due as it was or after a delay.
local ref = cjson.decode(ARGV[3])
local run_id, item_id = ref[1], ref[2]
local old = load_item(run_id, item_id)
if not old or not old[TOKEN] or old[TOKEN] ~= ref[3] then return answer('0') end
local row = call('HMGET', P .. 'run:' .. run_id, 'workflow', 'paused')
local it = copy(old)
it[OWNER], it[TOKEN], it[UNTIL], it[RUNG] = false, false, false, false
it[CLAIMS] = math.max(0, it[CLAIMS] - 1)
if ARGV[4] ~= '' then it[DUE] = int(now + tonumber(ARGV[4])) end
next_serial()
put_item(run_id, item_id, old, it, row[1], row[2])
tell_workers()
finish()
return answer('1')

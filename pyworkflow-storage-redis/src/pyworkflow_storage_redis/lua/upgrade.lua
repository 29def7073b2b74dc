-- upgrade: bring a store of layout 1 to layout 2, which lists open runs per state, and free items that
-- were claimed before: a part of the open runs, those after the number in ARGV[3]. The last number, or
-- null at the end.
local after, part = ARGV[3], 500
local found = call('ZRANGEBYSCORE', P .. 'runs:open', '(' .. after, '+inf', 'WITHSCORES', 'LIMIT', 0, part)
for i = 1, #found, 2 do
  local row = call('HMGET', P .. 'run:' .. found[i], 'workflow', 'final', 'stalled', 'paused', 'seen_seq')
  list_state(found[i + 1], found[i], row[1] or '', row[2], row[3], row[4], row[5])
  for item_id, it in pairs((load_items(found[i]))) do
    if not it[TOKEN] and it[CLAIMS] > 0 then call('ZADD', P .. 'tried', 0, member_of(found[i], item_id, it)) end
  end
end
if #found == 2 * part then return answer(found[#found]) end
if call('HGET', KEYS[1], 'format') == '1' then call('HSET', KEYS[1], 'format', '2') end
return answer('null')

-- shift_clock, for tests. Set back, leases that had ended may stand again: they go back to `held`.
local by = tonumber(ARGV[3])
next_serial()
finish()
call('HSET', KEYS[1], 'offset', int(tonumber(meta[3] or 0) + by))
now = now + by
if by < 0 then
  for _, bucket in ipairs(call('SMEMBERS', P .. 'buckets')) do
    for _, member in ipairs(call('ZRANGE', P .. 'due:' .. bucket, 0, -1)) do
      local run_id, item_id = parse_member(member)
      local it = load_item(run_id, item_id)
      if it and unexpired(it) and tonumber(it[UNTIL]) > tonumber(it[DUE]) then
        call('ZREM', P .. 'due:' .. bucket, member)
        call('ZADD', P .. 'held:' .. bucket, it[UNTIL], member)
      end
    end
  end
end
tell_workers()
finish()
return answer('null')

-- purge: remove ended runs of one part of the list of them; then idempotency keys whose time is over.
-- Begins with deletions, which are allowed when memory is full.
local before, limit, retention, skip, bound = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), 500
local wrote, removed = false, 0
local over = call('ZRANGEBYSCORE', P .. 'tombs', '-inf', now_text, 'LIMIT', 0, 1000)
for _, key in ipairs(over) do
  call('ZREM', P .. 'tombs', key)
  call('HDEL', P .. 'idem', key)
  call('ZREM', P .. 'idemorder', key)
  wrote = true
end
local list = call('ZRANGEBYSCORE', P .. 'ended', '-inf', '(' .. before, 'LIMIT', skip, bound)
local looked = 0
for _, run_id in ipairs(list) do
  if removed >= limit then break end
  looked = looked + 1
  local row_key = P .. 'run:' .. run_id
  local row = call('HMGET', row_key, 'final', 'workflow', 'parent_run', 'idempotency_key', 'finished_at', 'last_seq')
  local parent_open = false
  if row[3] then
    local parent = P .. 'run:' .. row[3]
    parent_open = call('EXISTS', parent) == 1 and not call('HGET', parent, 'final')
  end
  if not parent_open and call('EXISTS', P .. 'items:' .. run_id) == 0 then
    for _, kind in ipairs({ 'events:', 'keys:', 'outside:', 'recent:' }) do
      call('UNLINK', P .. kind .. run_id)
    end
    call('UNLINK', row_key)
    call('ZREM', P .. 'ended', run_id)
    call('ZREM', P .. 'runs:' .. row[1], run_id)
    call('ZREM', P .. 'runs:' .. row[1] .. ':' .. row[2], run_id)
    if row[4] then
      local till = tonumber(row[5]) + retention
      if till > now then
        call('ZADD', P .. 'tombs', int(till), row[4])
      else
        call('HDEL', P .. 'idem', row[4])
        call('ZREM', P .. 'idemorder', row[4])
        call('ZREM', P .. 'tombs', row[4])
      end
    end
    events_total = events_total - tonumber(row[6] or 0)
    removed, wrote = removed + 1, true
  end
end
if wrote then
  next_serial()
  finish()
end
-- How many stay before where the next call begins, and whether there is anything there.
return answer('[' .. int(removed) .. ',' .. int(skip + looked - removed) .. ',' ..
  ((looked < #list or #list == bound or #over == 1000) and 'true' or 'false') .. ']')

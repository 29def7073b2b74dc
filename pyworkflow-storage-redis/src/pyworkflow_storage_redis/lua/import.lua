-- import_delta: effects as another store had them. ARGV[3] has runs, keys taken and keys freed;
-- ARGV[4…] the runs' texts: events, row fields, items' payloads.
local delta, arg = cjson.decode(ARGV[3]), 4
for _, part in ipairs(delta.runs) do
  local length = tonumber(call('HGET', P .. 'run:' .. part.run, 'last_seq') or 0)
  part.length = length
  part.exists = call('EXISTS', P .. 'run:' .. part.run) == 1
  for _, event in ipairs(part.ev) do
    if event[3] > length then
      if event[3] ~= length + 1 then
        return answer('["missing",' .. enc(part.run) .. ',' .. int(length) .. ',' .. int(event[3]) .. ']')
      end
      break
    end
  end
end
next_serial()
finish()
for _, part in ipairs(delta.runs) do
  local run_id, row_key = part.run, P .. 'run:' .. part.run
  local old = call('HMGET', row_key, 'number', 'workflow', 'paused', 'final', 'finished_at')
  local texts, keys, last, last_input = {}, {}, part.length, nil
  for i, event in ipairs(part.ev) do
    if event[3] > part.length then
      texts[#texts + 1] = ARGV[arg + i - 1]
      last = event[3]
      if event[2] then
        keys[#keys + 1] = event[2]
        keys[#keys + 1] = int(event[3])
      end
      if event[1] == 'I' then last_input = event[3] end
    end
  end
  arg = arg + #part.ev
  local sets = {}
  for _, name in ipairs(part.row) do
    sets[#sets + 1] = name
    sets[#sets + 1] = ARGV[arg]
    arg = arg + 1
  end
  if part.removed then
    local items, ids = load_items(run_id)
    for _, id in ipairs(ids) do drop_item(run_id, id, items[id], old[2]) end
    for _, kind in ipairs({ 'run:', 'events:', 'keys:', 'outside:', 'recent:' }) do
      call('UNLINK', P .. kind .. run_id)
    end
    local state = old[4] or 'open'
    call('ZREM', P .. 'ended', run_id)
    unlist_run(state, run_id, old[2] or '')
    for _, list in ipairs(STATES) do unlist_run(list, run_id, old[2] or '') end
    events_total = events_total - part.length
    arg = arg + #part.items
  else
    if not part.exists then
      runs_total = runs_total + 1
      old[1] = int(runs_total)
      sets[#sets + 1] = 'number'
      sets[#sets + 1] = old[1]
    end
    if #texts > 0 then
      in_parts('RPUSH', P .. 'events:' .. run_id, texts)
      if #keys > 0 then in_parts('HSET', P .. 'keys:' .. run_id, keys) end
      sets[#sets + 1] = 'last_seq'
      sets[#sets + 1] = int(last)
      events_total = events_total + #texts
    end
    if last_input then
      sets[#sets + 1] = 'last_input'
      sets[#sets + 1] = int(last_input)
    end
    if part.attributes then
      for _, name in ipairs(call('HKEYS', row_key)) do
        if string.sub(name, 1, 1) == '@' then call('HDEL', row_key, name) end
      end
    end
    for _, name in ipairs(part.unset) do call('HDEL', row_key, name) end
    if #sets > 0 then in_parts('HSET', row_key, sets) end
    local row = call('HMGET', row_key, 'number', 'workflow', 'paused', 'final', 'finished_at', 'stalled',
      'seen_seq')
    local state, workflow, was = row[4] or 'open', row[2] or '', old[4] or 'open'
    if not part.exists or state ~= was or old[2] ~= row[2] then
      unlist_run(was, run_id, old[2] or '')
      list_run(state, row[1], run_id, workflow)
    end
    if old[2] and old[2] ~= row[2] then
      for _, list in ipairs(STATES) do unlist_run(list, run_id, old[2]) end
    end
    list_state(row[1], run_id, workflow, row[4], row[6], row[3], row[7])
    if row[5] then call('ZADD', P .. 'ended', row[5], run_id) end
    for _, id in ipairs(part.gone) do
      local it = load_item(run_id, id)
      if it then drop_item(run_id, id, it, old[2] or '') end
    end
    if old[2] and (old[2] ~= row[2] or (old[3] and true) ~= (row[3] and true)) then
      local items, ids = load_items(run_id)
      for _, id in ipairs(ids) do
        unplace(run_id, id, items[id], old[2])
        place(run_id, id, items[id], workflow, row[3])
      end
    end
    for _, item in ipairs(part.items) do
      local id, it = item[1], item[2]
      it[PAYLOAD], it[NUMBER] = ARGV[arg], 0
      arg = arg + 1
      put_item(run_id, id, load_item(run_id, id) or nil, it, workflow, row[3])
    end
    for _, record in ipairs(part.records) do
      local token = record[2]
      local kept = { record[1], record[3], record[4], record[5], record[6], record[7], record[8],
        record[9], record[10], next_serial() }
      if token == '' then
        call('HSET', P .. 'outside:' .. run_id, record[1], cmsgpack.pack(kept))
      else
        local key = P .. 'recent:' .. run_id
        call('HSET', key, token, cmsgpack.pack(kept))
        if call('HLEN', key) > 64 then
          local flat, oldest, number = call('HGETALL', key), nil, nil
          for i = 1, #flat, 2 do
            local one = cmsgpack.unpack(flat[i + 1])
            if not number or one[10] < number then oldest, number = flat[i], one[10] end
          end
          call('HDEL', key, oldest)
        end
      end
    end
    tell_readers(run_id, last, row[4])
  end
end
for _, key in ipairs(delta.freed) do
  call('HDEL', P .. 'idem', key)
  call('ZREM', P .. 'idemorder', key)
  call('ZREM', P .. 'tombs', key)
end
for _, mark in ipairs(delta.taken) do
  call('HSET', P .. 'idem', mark[1], mark[2])
  call('ZADD', P .. 'idemorder', 0, mark[1])
  if mark[3] == '' then
    call('ZREM', P .. 'tombs', mark[1])
  else
    call('ZADD', P .. 'tombs', mark[3], mark[1])
  end
end
tell_workers()
finish()
return answer('null')

-- commit, commit_many: ARGV has for each change a header (JSON), then its payload texts in the order
-- in which they are used here: events, row fields, the settled item's payload, the puts' payloads.
local STALLED_PAUSE, KEPT_TOKENS = 1000000, 64

local function ints(list)
  if #list == 0 then return '[]' end
  local texts = {}
  for i, n in ipairs(list) do texts[i] = int(n) end
  return '[' .. table.concat(texts, ',') .. ']'
end

local function events_after(run_id, seen, last)
  if seen >= last then return {} end
  -- From the end: the news are there.
  return call('LRANGE', P .. 'events:' .. run_id, seen - last, -1)
end

local function committed(how, rec, others, claims)
  return '[' .. how .. ',' .. int(rec[2]) .. ',' .. int(rec[3]) .. ',' .. rec[4] .. ',' .. rec[5] .. ',' ..
    rec[6] .. ',' .. ints(rec[7]) .. ',' .. ints(rec[8]) .. ',[' .. table.concat(others, ',') .. '],[' ..
    table.concat(claims, ',') .. ']]'
end

local function again(run_id, rec, claim)
  local others, claims = {}, {}
  local has_turn = claim and claim[1] == 'turn'
  for _, held in ipairs(rec[9]) do
    local it = load_item(run_id, held[1])
    if it and it[TOKEN] == held[2] then
      claims[#claims + 1] = item_json(held[1], it)
      has_turn = has_turn or held[1] == 'turn'
    end
  end
  if claim and has_turn and rec[3] < rec[2] then
    local own, skipped = {}, {}
    for _, index in ipairs(rec[8]) do skipped[index] = true end
    for index, seq in ipairs(rec[7]) do
      if not skipped[index - 1] then own[seq] = true end
    end
    for i, text in ipairs(call('LRANGE', P .. 'events:' .. run_id, rec[3], rec[2] - 1)) do
      if not own[rec[3] + i] then others[#others + 1] = text end
    end
  end
  return committed(1, rec, others, claims)
end

local function fenced(item_id) return '["fenced",' .. enc(item_id) .. ']' end

local function fits_closed(h, item_of)
  if h.ctl or h.fin or h.upd or h.seen or h.drop then return false end
  for _, event in ipairs(h.ev) do
    if event[1] ~= 'O' then return false end
  end
  if h.claim and item_of(h.claim[1]) then
    for _, put in ipairs(h.put or {}) do
      if put.kind ~= 'deliver' then return false end
    end
    return true
  end
  return not h.set and not h.put
end

local function keep_answer(run_id, claim, record)
  record[10] = next_serial()
  if not claim then
    call('HSET', P .. 'outside:' .. run_id, record[1], cmsgpack.pack(record))
    return
  end
  local key = P .. 'recent:' .. run_id
  if call('HSET', key, claim[2], cmsgpack.pack(record)) == 1 and call('HLEN', key) > KEPT_TOKENS then
    local flat, oldest, number = call('HGETALL', key), nil, nil
    for i = 1, #flat, 2 do
      local kept = cmsgpack.unpack(flat[i + 1])
      if not number or kept[10] < number then oldest, number = flat[i], kept[10] end
    end
    call('HDEL', key, oldest)
  end
end

local function commit_one(h, arg)
  local run_id, claim = h.run, h.claim
  local row_key = P .. 'run:' .. run_id
  local row = call('HMGET', row_key, 'number', 'create_key', 'last_seq', 'last_input', 'seen_seq',
    'updated_at', 'paused', 'stalled', 'final', 'queue', 'priority', 'workflow')
  local exists, workflow, final = row[1], row[12] or h.workflow, row[9]
  local known, changed, order = {}, {}, {}

  local function item_of(id)
    local it = changed[id]
    if it == nil then
      it = known[id]
      if it == nil then
        it = exists and load_item(run_id, id) or false
        known[id] = it
      end
    end
    return it
  end
  local function set_item(id, it)
    if changed[id] == nil then order[#order + 1] = id end
    changed[id] = it
  end

  if h.new then
    if exists then
      if (row[2] or '') ~= h.key then return '["exists"]' end
      local text = call('HGET', P .. 'outside:' .. run_id, h.key)
      if not text then return '["exists"]' end
      return again(run_id, cmsgpack.unpack(text), nil)
    end
  elseif not exists then
    return '["absent"]'
  else
    local text
    if claim then
      text = call('HGET', P .. 'recent:' .. run_id, claim[2])
    else
      text = call('HGET', P .. 'outside:' .. run_id, h.key)
    end
    if text then
      local record = cmsgpack.unpack(text)
      if record[1] == h.key then return again(run_id, record, claim) end
    end
  end

  -- Refusals.
  local turn_held = claim and claim[1] == 'turn'
  local stalled, paused = row[8], row[7] and true or false
  local seen, last, last_input = tonumber(row[5] or 0), tonumber(row[3] or 0), tonumber(row[4] or 0)
  if exists then
    if final and not fits_closed(h, item_of) then return '["closed","' .. final .. '"]' end
    if claim then
      local it = item_of(claim[1])
      if not it or it[TOKEN] ~= claim[2] then return fenced(claim[1]) end
    end
    if (h.seen or h.drop) and not turn_held then return fenced('turn') end
    if h.ctl == 'stall' then
      if not turn_held then return fenced('turn') end
    elseif h.ctl == 'cancel' then
      local turn = item_of('turn')
      local held = turn and unexpired(turn)
      if (seen > 0 and not stalled) or (held and not turn_held) then return fenced('turn') end
    end
  end

  -- The plan: nothing is written before it is whole.
  -- Never before what the run already has: the clock may have been set back.
  local at = math.max(now, tonumber(row[6] or (h.new and now or 0)))
  local at_text = int(at)
  local sets, dels, born = {}, {}, {}
  local new_texts, new_keys, seqs, skipped = {}, {}, {}, {}
  local old_last, old_input = last, last_input
  local progress, settled_turn, fields, new_paused, new_stalled = false, false, false, paused, stalled
  local queue, priority = row[10] or h.queue or 'default', row[11] or h.priority or '0'

  local function set_field(name, value)
    fields = true
    sets[#sets + 1] = name
    sets[#sets + 1] = value
  end
  local function unset_field(name)
    fields = true
    dels[#dels + 1] = name
  end
  -- Workers of 0.1.0 do not know the lists per state: what they left out of the short ones is put in
  -- by the next change of the run.
  local function relist(old_seen)
    local was = exists and state_of(final, stalled, paused, old_seen)
    local is = not h.fin and state_of(final, new_stalled, new_paused, seen)
    if was and was ~= is then unlist_run(was, run_id, workflow) end
    if is and (is ~= was or is ~= 'started') then list_run(is, row[1], run_id, workflow) end
    if is and not was then list_run('open', row[1], run_id, workflow) end
    if was and not is then unlist_run('open', run_id, workflow) end
  end
  local function end_lease(it)
    it[OWNER], it[TOKEN], it[UNTIL] = false, false, false
  end
  local function give_lease(it, held)
    it[OWNER], it[TOKEN], it[UNTIL] = held[1], 't' .. int(next_serial()), int(now + tonumber(held[2]))
  end
  local function bring_forward(due)
    local turn = item_of('turn')
    if turn and tonumber(turn[DUE]) > due then
      local it = copy(turn)
      it[DUE], it[RUNG] = int(due), false
      set_item('turn', it)
    end
  end
  local function put(p)
    local due, it = p.due or now_text, item_of(p.id)
    local rung = p.rung and now_text or false
    if it then
      if tonumber(due) < tonumber(it[DUE]) then
        it = copy(it)
        it[DUE], it[RUNG] = due, rung
        set_item(p.id, it)
      end
      return
    end
    it = { p.kind, p.queue or queue, p.priority or priority, due, 0, false, false, false, rung,
      p.payload or '{}', 0 }
    if p.held then
      give_lease(it, p.held)
      it[CLAIMS], it[RUNG] = 1, false
      born[#born + 1] = p.id
    end
    set_item(p.id, it)
  end

  local control = h.ctl
  if control == 'pause' then
    if not paused then
      new_paused = true
      set_field('paused', '1')
    end
  elseif control == 'unpause' then
    if paused then
      new_paused = false
      unset_field('paused')
      if last_input > seen then bring_forward(now) end
    end
  elseif control == 'stall' then
    if stalled ~= h.reason then
      new_stalled = h.reason
      set_field('stalled', h.reason)
    end
  elseif control == 'unstall' and stalled then
    new_stalled = false
    unset_field('stalled')
    progress = true
    bring_forward(now)
  end

  local events = h.ev
  if #events > 0 then
    local asked, standing = {}, {}
    for _, event in ipairs(events) do
      if event[2] then asked[#asked + 1] = event[2] end
    end
    if exists then
      for start = 1, #asked, 1000 do
        local stop = math.min(start + 999, #asked)
        local found = call('HMGET', P .. 'keys:' .. run_id, unpack(asked, start, stop))
        for i = start, stop do standing[asked[i]] = tonumber(found[i - start + 1] or nil) end
      end
    end
    for index, event in ipairs(events) do
      local klass, key = event[1], event[2]
      local seq = key and standing[key]
      if seq then
        seqs[index] = seq
        skipped[#skipped + 1] = index - 1
      else
        last = last + 1
        seqs[index] = last
        new_texts[#new_texts + 1] = '[' .. int(last) .. ',' .. at_text .. ',' .. ARGV[arg + index - 1] .. ']'
        if key then
          standing[key] = last
          new_keys[#new_keys + 1] = key
          new_keys[#new_keys + 1] = int(last)
        end
        if klass == 'I' then
          last_input = last
          progress = true
        elseif klass == 'C' then
          progress = true
        end
      end
    end
  end
  arg = arg + #events

  for _, name in ipairs(h.row or {}) do
    set_field(name, ARGV[arg])
    arg = arg + 1
  end

  local old_seen = seen
  if h.seen then
    if h.seen > last then return '["value",' .. int(h.seen) .. ',' .. int(last) .. ']' end
    if h.seen > seen then
      if seen == 0 then set_field('started_at', at_text) end
      seen = h.seen
      set_field('seen_seq', int(seen))
      -- A delivered input is progress, even when the code records nothing for it.
      progress = true
    end
  end
  if h.fin and not control and last_input > seen then
    local history = events_after(run_id, seen, old_last)
    for _, text in ipairs(new_texts) do history[#history + 1] = text end
    return '["unseen",' .. int(seen) .. ',[' .. table.concat(history, ',') .. ']]'
  end

  for _, id in ipairs(h.drop or {}) do
    local it = item_of(id)
    if it and it[KIND] == 'step' then set_item(id, false) end
  end

  if claim then
    local settle, id = h.set, claim[1]
    local payload
    if settle and settle.payload then
      payload = ARGV[arg]
      arg = arg + 1
    end
    local it = item_of(id)
    if it then
      if not settle or settle.keep then
        -- Progress is counted with the claim that stands.
        local claims = progress and 1 or it[CLAIMS]
        if payload or claims ~= it[CLAIMS] then
          it = copy(it)
          it[CLAIMS], it[PAYLOAD] = claims, payload or it[PAYLOAD]
          set_item(id, it)
        end
      else
        settled_turn = it[KIND] == 'turn'
        if not settle.due then
          set_item(id, false)
        else
          -- A new payload is the next try of a step: its holder is alive and well.
          progress = progress or payload ~= nil
          it = copy(it)
          end_lease(it)
          it[DUE], it[RUNG], it[PAYLOAD] = settle.due, false, payload or it[PAYLOAD]
          if progress then it[CLAIMS] = 0 end
          set_item(id, it)
        end
      end
    end
  end

  for _, p in ipairs(h.put or {}) do
    if p.payload then
      p.payload = ARGV[arg]
      arg = arg + 1
    end
    put(p)
  end

  if h.fin then
    set_field('final', h.fin)
    set_field('finished_at', at_text)
    if stalled then unset_field('stalled') end
    local stored, ids = {}, {}
    if exists then stored, ids = load_items(run_id) end
    for _, id in ipairs(ids) do
      if known[id] == nil then known[id] = stored[id] end
      if stored[id][KIND] ~= 'deliver' then set_item(id, false) end
    end
    for _, id in ipairs(order) do
      if changed[id] and changed[id][KIND] ~= 'deliver' then changed[id] = false end
    end
  elseif not final then
    if last_input > seen then
      -- I5: an input that was not delivered makes the turn due.
      local soon = new_stalled and now + STALLED_PAUSE or now
      if not item_of('turn') then
        put({ id = 'turn', kind = 'turn', due = int(soon) })
      elseif control == 'stall' then
        -- Its holder gave the turn back until code may be there that fits the history.
      elseif last_input > old_input or (settled_turn and not new_stalled) then
        bring_forward(soon)
      end
    end
    if h.take then
      local turn = item_of('turn')
      if turn and tonumber(turn[DUE]) <= now and not unexpired(turn) and not new_paused then
        local it = copy(turn)
        give_lease(it, h.take)
        it[CLAIMS], it[RUNG] = it[CLAIMS] + 1, false
        set_item('turn', it)
        born[#born + 1] = 'turn'
      end
    end
  end

  if h.new and h.idem then
    local owner = call('HGET', P .. 'idem', h.idem)
    if owner then
      local till = call('ZSCORE', P .. 'tombs', h.idem)
      if not till or tonumber(till) > now then return '["taken",' .. enc(owner) .. ']' end
    end
  end

  -- The effects.
  local others, claims, held = {}, {}, {}
  -- What others added is for the holder of the turn alone: to all steps of a wide run it would be
  -- quadratic.
  local has_turn = claim and claim[1] == 'turn'
  for _, id in ipairs(born) do has_turn = has_turn or (claim and id == 'turn') end
  if has_turn then others = events_after(run_id, seen, old_last) end
  local record = { h.key, last, seen, new_paused and 1 or 0, at_text, now_text, seqs, skipped, held, 0 }
  if fields or #new_texts > 0 or #order > 0 then
    for _, id in ipairs(born) do
      local it = changed[id]
      if it and it[TOKEN] then held[#held + 1] = { id, it[TOKEN] } end
    end
    -- First a command that is refused when memory is full: then nothing of the script is done.
    keep_answer(run_id, claim, record)
    if h.new then
      runs_total = runs_total + 1
      local number = int(runs_total)
      sets[#sets + 1] = 'number'
      sets[#sets + 1] = number
      sets[#sets + 1] = 'created_at'
      sets[#sets + 1] = now_text
      fields = true
      row[1] = number
      if h.idem then
        call('HSET', P .. 'idem', h.idem, run_id)
        call('ZADD', P .. 'idemorder', 0, h.idem)
        call('ZREM', P .. 'tombs', h.idem)
      end
    end
    if fields or #new_texts > 0 then
      sets[#sets + 1] = 'updated_at'
      sets[#sets + 1] = at_text
    end
    if #new_texts > 0 then
      sets[#sets + 1] = 'last_seq'
      sets[#sets + 1] = int(last)
      if last_input > old_input then
        sets[#sets + 1] = 'last_input'
        sets[#sets + 1] = int(last_input)
      end
      in_parts('RPUSH', P .. 'events:' .. run_id, new_texts)
      if #new_keys > 0 then in_parts('HSET', P .. 'keys:' .. run_id, new_keys) end
      events_total = events_total + #new_texts
    end
    if #sets > 0 then in_parts('HSET', row_key, sets) end
    if #dels > 0 then call('HDEL', row_key, unpack(dels)) end
    relist(old_seen)
    if h.fin then
      list_run(h.fin, row[1], run_id, workflow)
      call('ZADD', P .. 'ended', at_text, run_id)
    end
    local news = false
    for _, id in ipairs(order) do
      local it, old = changed[id], known[id] or nil
      if it then
        -- Nobody can claim what has a lease before it ends, and workers look again sooner.
        news = news or not unexpired(it)
        put_item(run_id, id, old, it, workflow, paused)
      elseif old then
        drop_item(run_id, id, old, workflow)
      end
    end
    if new_paused ~= paused then
      news = true
      local items, ids = load_items(run_id)
      for _, id in ipairs(ids) do
        unplace(run_id, id, items[id], workflow)
        place(run_id, id, items[id], workflow, new_paused)
      end
    end
    if #new_texts > 0 or h.fin then tell_readers(run_id, last, h.fin) end
    if news then tell_workers() end
  end
  for _, id in ipairs(born) do
    if changed[id] then claims[#claims + 1] = item_json(id, changed[id]) end
  end
  return committed(0, record, others, claims)
end

local answers, arg, before = {}, 3, serial
while arg <= #ARGV do
  local h = cjson.decode(ARGV[arg])
  answers[#answers + 1] = commit_one(h, arg + 1)
  arg = arg + 1 + h.n
end
if serial > before then finish() end
return answer('[' .. table.concat(answers, ',') .. ']')

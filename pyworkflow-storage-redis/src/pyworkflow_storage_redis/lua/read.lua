-- The reads of one run, of the clock and of keys. ARGV[3] says what, ARGV[4] of which.
local what, name = ARGV[3], ARGV[4]
if what == 'now' then
  return answer('null')
elseif what == 'find' then
  local owner = call('HGET', P .. 'idem', name)
  local till = owner and call('ZSCORE', P .. 'tombs', name)
  if not owner or (till and tonumber(till) <= now) then return answer('null') end
  return answer(enc(owner))
elseif what == 'keys' then
  -- Idempotency keys in their order, after `name` (with a mark before it) or from the first one.
  local found, texts = call('ZRANGEBYLEX', P .. 'idemorder', name, '+', 'LIMIT', 0, tonumber(ARGV[5])), {}
  for i, key in ipairs(found) do
    local till = call('ZSCORE', P .. 'tombs', key)
    texts[i] = '[' .. enc(key) .. ',' .. enc(call('HGET', P .. 'idem', key)) .. ',' ..
      (till and int(tonumber(till)) or 'null') .. ']'
  end
  return answer('[' .. table.concat(texts, ',') .. ']')
elseif what == 'work' then
  return answer(int(work))
end
local exists = call('EXISTS', P .. 'run:' .. name) == 1
if what == 'run' then
  return answer(exists and run_json(name) or 'null')
elseif what == 'peek' then
  if not exists then return answer('null') end
  local row = call('HMGET', P .. 'run:' .. name, 'last_seq', 'final')
  return answer('[' .. (row[1] or '0') .. ',' .. (row[2] and 'true' or 'false') .. ']')
elseif what == 'events' then
  local total = tonumber(call('HGET', P .. 'run:' .. name, 'last_seq') or 0)
  local after, most = tonumber(ARGV[5]), tonumber(ARGV[6])
  -- One event may be larger than the bound.
  local found = read_events(name, after, most, 4194304, total)
  if #found == 0 and most > 0 then found = read_events(name, after, 1, math.huge, total) end
  return answer('[' .. int(total) .. ',[' .. table.concat(found, ',') .. ']]')
elseif what == 'items' or what == 'export' then
  local items, ids = load_items(name)
  local texts = {}
  for i, id in ipairs(ids) do texts[i] = item_json(id, items[id]) end
  local body = '[' .. table.concat(texts, ',') .. ']'
  if what == 'items' then return answer(body) end
  if not exists then return answer('null') end
  local records = {}
  for _, kept in ipairs({ 'outside:', 'recent:' }) do
    local flat = call('HGETALL', P .. kept .. name)
    for i = 1, #flat, 2 do
      local rec = cmsgpack.unpack(flat[i + 1])
      local seqs, skipped, held = {}, {}, {}
      for n, seq in ipairs(rec[7]) do seqs[n] = int(seq) end
      for n, index in ipairs(rec[8]) do skipped[n] = int(index) end
      for n, claim in ipairs(rec[9]) do held[n] = '[' .. enc(claim[1]) .. ',' .. enc(claim[2]) .. ']' end
      records[#records + 1] = '[' .. enc(rec[1]) .. ',' .. (kept == 'recent:' and enc(flat[i]) or 'null') ..
        ',' .. int(rec[2]) .. ',' .. int(rec[3]) .. ',' .. rec[4] .. ',' .. rec[5] .. ',' .. rec[6] ..
        ',[' .. table.concat(seqs, ',') .. '],[' .. table.concat(skipped, ',') .. '],[' ..
        table.concat(held, ',') .. '],' .. int(rec[10]) .. ']'
    end
  end
  return answer('[' .. enc(call('HGETALL', P .. 'run:' .. name)) .. ',' .. body .. ',[' ..
    table.concat(records, ',') .. ']]')
end
return redis.error_reply('ERR no such read')

-- announce: due, free items that nobody rang for within the mute time; rung for now. Looks at no
-- more items than the bound: those beyond it have their turn when these are claimed.
local limit, mute, bound = tonumber(ARGV[3]), tonumber(ARGV[4]), 2000
local buckets = matching(nil, nil, nil)
local wrote, looked, rung = expire(buckets), 0, {}
if limit > 0 then
  each_due(buckets, 100, function(run_id, item_id, old)
    looked = looked + 1
    if not old[RUNG] or tonumber(old[RUNG]) + mute <= now then
      rung[#rung + 1] = { run_id, item_id, old }
    end
    return #rung < limit and looked < bound
  end)
end
local texts = {}
for i, one in ipairs(rung) do
  one[3][RUNG] = now_text
  call('HSET', P .. 'items:' .. one[1], one[2], cmsgpack.pack(one[3]))
  texts[i] = '[' .. enc(one[1]) .. ',' .. item_json(one[2], one[3]) .. ']'
end
if wrote or #rung > 0 then
  next_serial()
  finish()
end
return answer('[' .. table.concat(texts, ',') .. ']')

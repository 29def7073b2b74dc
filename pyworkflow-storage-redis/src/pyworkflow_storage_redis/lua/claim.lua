-- claim: take due, free items, by reference or by filters; turns bring events.
local q = cjson.decode(ARGV[3])
local buckets, expired = nil, false
local taken = {}

local function take(run_id, item_id, it)
  taken[#taken + 1] = { run_id, item_id, it }
  return #taken < q.limit
end

if q.items then
  local queues, kinds, workflows = set_of(q.queues), set_of(q.kinds), set_of(q.workflows)
  local seen = {}
  for _, ref in ipairs(q.items) do
    if #taken >= q.limit then break end
    local run_id, item_id = ref[1], ref[2]
    local name = #run_id .. ':' .. run_id .. item_id
    local it = not seen[name] and load_item(run_id, item_id)
    if it and tonumber(it[DUE]) <= now and not unexpired(it) and
      (not queues or queues[it[QUEUE]]) and (not kinds or kinds[it[KIND]]) then
      local row = call('HMGET', P .. 'run:' .. run_id, 'workflow', 'paused')
      local deliver = it[KIND] == 'deliver'
      if deliver or (not row[2] and (not workflows or workflows[row[1]])) then
        seen[name] = true
        take(run_id, item_id, it)
      end
    end
  end
elseif q.limit > 0 then
  buckets = matching(q.queues, q.workflows, q.kinds)
  expired = expire(buckets)
  each_due(buckets, math.min(q.limit, 100), take)
end

local till = int(now + tonumber(q.lease))
for _, one in ipairs(taken) do
  local run_id, item_id, old = one[1], one[2], one[3]
  local it = copy(old)
  it[OWNER], it[TOKEN], it[UNTIL] = q.owner, 't' .. int(next_serial()), till
  it[CLAIMS], it[RUNG] = it[CLAIMS] + 1, false
  one[3] = it
  -- By reference no pause hides a delivery, and no other item comes here.
  local workflow = call('HGET', P .. 'run:' .. run_id, 'workflow')
  put_item(run_id, item_id, old, it, workflow, false, true)
end
if #taken > 0 or expired then
  next_serial()
  finish()
end

-- The lease of the claim decides the status, mostly: all items of the run, read for each of its
-- steps, would make wide runs quadratic.
local function claimed_status(run_id, it)
  if not unexpired(it) then return status_of(run_id) end
  local row = call('HMGET', P .. 'run:' .. run_id, 'final', 'stalled', 'paused')
  return derive(row[1], row[2], row[3], 0, { it })
end

local found, budget = {}, q.bytes
for _, one in ipairs(taken) do
  local run_id, item_id, it = one[1], one[2], one[3]
  local after, events, cut = 0, {}, 'false'
  if it[KIND] == 'turn' then
    local total = tonumber(call('HGET', P .. 'run:' .. run_id, 'last_seq') or 0)
    after = q.known[run_id] or 0
    if after < 0 or after > total then after = 0 end
    local size
    events, size = read_events(run_id, after, total, budget, total)
    budget = budget - size
    if after + #events < total then cut = 'true' end
  end
  found[#found + 1] = '[' .. enc(run_id) .. ',' .. item_json(item_id, it) .. ',' .. run_json(run_id, claimed_status(run_id, it)) ..
    ',' .. int(after) .. ',' .. cut .. ',[' .. table.concat(events, ',') .. ']]'
end
return answer('[' .. int(work) .. ',[' .. table.concat(found, ',') .. ']]')

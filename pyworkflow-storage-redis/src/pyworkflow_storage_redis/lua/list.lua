-- list_runs, stats: runs by number, newest first, `bound` of them looked at per call at most.
local q = cjson.decode(ARGV[3])
if q.counts then
  -- Ended runs are counted by their index, open ones by the caller, part by part.
  local texts = { '"runs":0,"events":' .. int(events_total) .. ',"items":' .. int(items_total) }
  for _, status in ipairs({ 'completed', 'failed', 'cancelled', 'terminated', 'continued' }) do
    texts[#texts + 1] = '"' .. status .. '":' .. int(call('ZCARD', P .. 'runs:' .. status))
  end
  return answer('{' .. table.concat(texts, ',') .. '}')
end
local states, wanted = q.states, set_of(q.statuses)
local heads, found, last, looked = {}, {}, nil, 0
local function fill(head)
  local list = call('ZREVRANGEBYSCORE', head.key, head.below, '-inf', 'WITHSCORES', 'LIMIT', 0, head.chunk)
  head.list, head.at, head.done = list, 1, #list < 2 * head.chunk
  if #list > 0 then head.below = '(' .. list[#list] end
end
-- Runs of which an item is in one of the ranges that `each` adds, newest first; nil if there are many.
local function runs_of(each)
  local runs, count, found = {}, 0, {}
  local function add(key, from, to)
    if count > q.bound then return end
    for _, member in ipairs(call('ZRANGEBYSCORE', key, from, to, 'LIMIT', 0, q.bound + 1)) do
      local run_id = parse_member(member)
      if not runs[run_id] then runs[run_id], count = true, count + 1 end
    end
  end
  for _, bucket in ipairs(call('SMEMBERS', P .. 'buckets')) do
    add(P .. 'held:' .. bucket, '-inf', '+inf')
    each(add, bucket)
  end
  add(P .. 'aside', '-inf', '+inf')
  each(add)
  if count > q.bound then return nil end
  for run_id in pairs(runs) do
    local row = call('HMGET', P .. 'run:' .. run_id, 'number', 'workflow')
    if row[1] and (not q.workflow or row[2] == q.workflow) and
      (not q.below or tonumber(row[1]) < tonumber(q.below)) then
      found[#found + 1] = { run_id, row[1] }
    end
  end
  table.sort(found, function(a, b) return tonumber(a[2]) > tonumber(b[2]) end)
  local flat = {}
  for _, one in ipairs(found) do
    flat[#flat + 1] = one[1]
    flat[#flat + 1] = one[2]
  end
  return flat
end
-- Runs with a lease or a due item: those that may be running. Runs with an item that was claimed: of
-- the unstarted ones, those that are not pending.
local function awake()
  return runs_of(function(add, bucket)
    if bucket then add(P .. 'due:' .. bucket, '-inf', now_text) end
  end)
end
local function tried()
  return runs_of(function(add, bucket)
    if not bucket then add(P .. 'tried', '-inf', '+inf') end
  end)
end
local function add_head(state, list)
  local key = P .. 'runs:' .. state
  if q.workflow then key = key .. ':' .. q.workflow end
  local head = { key = key, below = q.below and '(' .. q.below or '+inf', chunk = math.min(q.limit + 1, 200) }
  if list then
    head.list, head.at, head.done = list, 1, true
  else
    fill(head)
  end
  heads[#heads + 1] = head
end
for _, state in ipairs(states) do
  if state == 'tried' then
    add_head('unstarted', tried())
  elseif state == 'awake' then
    local list = awake()
    add_head('started', list)
    -- Where many are awake, the newest of these have them.
    if not list then add_head('unstarted', tried()) end
  else
    add_head(state)
  end
end
local more = false
while true do
  local best
  for _, head in ipairs(heads) do
    if head.at > #head.list and not head.done then fill(head) end
    if head.at <= #head.list and
      (not best or tonumber(head.list[head.at + 1]) > tonumber(best.list[best.at + 1])) then best = head end
  end
  if not best then break end
  if #found >= q.limit or looked >= q.bound then
    more = true
    break
  end
  local run_id, number = best.list[best.at], best.list[best.at + 1]
  best.at = best.at + 2
  -- It may be in several lists.
  local status = number ~= last and status_of(run_id)
  looked, last = looked + 1, number
  if status and (not wanted or wanted[status]) then
    if q.names then
      found[#found + 1] = '"' .. status .. '"'
    else
      found[#found + 1] = '[' .. number .. ',' .. enc(run_id) .. ',' .. run_json(run_id, status) .. ']'
    end
  end
end
return answer('[[' .. table.concat(found, ',') .. '],' .. (last or 'null') .. ',' ..
  (more and 'true' or 'false') .. ']')

-- What every script has in common: the clock, items, the due index, and answers as JSON text.
-- Payloads are never parsed here: JSON that the client wrote is joined to JSON as it stands.
-- A script that fails midway is not rolled back, so each decides everything before it writes.
-- ARGV: the highest serial that the client was told, the store's identity ('' if not known), then
-- the method's own. Instants are microseconds since 1970, in decimal text so that none is rounded.
local P = string.sub(KEYS[1], 1, -5)
local call, fmt, enc = redis.call, string.format, cjson.encode
local KIND, QUEUE, PRIORITY, DUE, CLAIMS, OWNER, TOKEN, UNTIL, RUNG, PAYLOAD, NUMBER =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11

local function int(n) return fmt('%.0f', n) end

local meta = call('HMGET', KEYS[1], 'serial', 'latest', 'offset', 'events', 'items', 'runs', 'work', 'id', 'lead')
local serial, latest = tonumber(meta[1] or 0), tonumber(meta[2] or 0)
local events_total, items_total = tonumber(meta[4] or 0), tonumber(meta[5] or 0)
local runs_total, work = tonumber(meta[6] or 0), tonumber(meta[7] or 0)
if serial < tonumber(ARGV[1]) or (ARGV[2] ~= '' and meta[8] ~= ARGV[2]) then
  return redis.error_reply('LOSTWRITES ' .. int(serial))
end
-- The store's clock is the server's, plus `lead`. When that was set back behind the latest reading,
-- the lead grows by as much: the store's clock continues from there at the pace of real time. For
-- less than a second it waits: a clock that is corrected to and fro must not drive it ahead.
local clock, lead = call('TIME'), tonumber(meta[9] or 0)
local reading = tonumber(clock[1]) * 1000000 + tonumber(clock[2]) + lead
if reading < latest then
  if latest - reading > 1000000 then
    redis.pcall('HSET', KEYS[1], 'lead', int(lead + latest - reading))
  end
  reading = latest
end
latest = reading
local now = latest + tonumber(meta[3] or 0)
local now_text = int(now)

local function next_serial()
  serial = serial + 1
  return serial
end

-- The last write of a script that wrote.
local function finish()
  call('HSET', KEYS[1], 'serial', int(serial), 'latest', int(latest), 'events', int(events_total),
    'items', int(items_total), 'runs', int(runs_total), 'work', int(work))
end

-- News are hints: an account that may not publish loses nothing but speed.
local function tell_workers()
  work = work + 1
  redis.pcall('PUBLISH', P .. 'news', '')
end

-- Who waits for the end alone has a channel that is silent until then.
local function tell_readers(run_id, last, ended)
  redis.pcall('PUBLISH', P .. 'run:' .. run_id, int(last) .. (ended and ' end' or ''))
  if ended then redis.pcall('PUBLISH', P .. 'end:' .. run_id, int(last) .. ' end') end
end

-- Redis calls take so many arguments only.
local function in_parts(command, key, values)
  for start = 1, #values, 1000 do
    call(command, key, unpack(values, start, math.min(start + 999, #values)))
  end
end

-- Items ---------------------------------------------------------------------------------------

local function load_item(run_id, item_id)
  local text = call('HGET', P .. 'items:' .. run_id, item_id)
  return text and cmsgpack.unpack(text)
end

local function load_items(run_id)
  local flat, items, ids = call('HGETALL', P .. 'items:' .. run_id), {}, {}
  for i = 1, #flat, 2 do
    items[flat[i]] = cmsgpack.unpack(flat[i + 1])
    ids[#ids + 1] = flat[i]
  end
  return items, ids
end

local function copy(item)
  local it = {}
  for i = 1, NUMBER do it[i] = item[i] end
  return it
end

local function text_or_null(value)
  return value and enc(value) or 'null'
end

local function item_json(item_id, it)
  return '[' .. enc(item_id) .. ',' .. enc(it[KIND]) .. ',' .. enc(it[QUEUE]) .. ',' .. it[PRIORITY] ..
    ',' .. it[DUE] .. ',' .. int(it[CLAIMS]) .. ',' .. text_or_null(it[OWNER]) .. ',' ..
    text_or_null(it[TOKEN]) .. ',' .. (it[UNTIL] or 'null') .. ',' .. (it[RUNG] or 'null') .. ',' ..
    it[PAYLOAD] .. ']'
end

local function unexpired(it)
  return it[TOKEN] and tonumber(it[UNTIL]) > now
end

-- The due index -------------------------------------------------------------------------------
-- A bucket is one kind, priority, queue and workflow. due:B has the items that are free, by when
-- they are due; held:B the leased ones, by when the lease ends. Items of paused runs, and leases
-- that end before their item is due, are in `aside` alone, so that leases can be found by time.
-- Free items that were claimed before are in `tried` as well.

local function bucket_of(it, workflow)
  return it[KIND] .. ':' .. it[PRIORITY] .. ':' .. #it[QUEUE] .. ':' .. it[QUEUE] .. workflow
end

-- Items that are due at the same moment come in the order of their numbers.
local function member_of(run_id, item_id, it)
  return fmt('%016.0f', it[NUMBER]) .. #run_id .. ':' .. run_id .. item_id
end

local function parse_member(member)
  local at = string.find(member, ':', 17, true)
  local stop = at + tonumber(string.sub(member, 17, at - 1))
  return string.sub(member, at + 1, stop), string.sub(member, stop + 1)
end

local function unplace(run_id, item_id, it, workflow)
  local bucket, member = bucket_of(it, workflow), member_of(run_id, item_id, it)
  call('ZREM', P .. 'due:' .. bucket, member)
  if it[TOKEN] then
    call('ZREM', P .. 'held:' .. bucket, member)
    call('ZREM', P .. 'aside', member)
  elseif it[CLAIMS] > 0 then
    call('ZREM', P .. 'tried', member)
  end
end

local function place(run_id, item_id, it, workflow, paused)
  local bucket, member = bucket_of(it, workflow), member_of(run_id, item_id, it)
  local parked = paused and it[KIND] ~= 'deliver'
  local held = it[TOKEN] and tonumber(it[UNTIL]) > tonumber(it[DUE])
  if it[TOKEN] and (parked or not held) then
    call('ZADD', P .. 'aside', it[UNTIL], member)
  elseif not it[TOKEN] and it[CLAIMS] > 0 then
    call('ZADD', P .. 'tried', 0, member)
  end
  if not parked then
    if held then
      call('ZADD', P .. 'held:' .. bucket, it[UNTIL], member)
    else
      call('ZADD', P .. 'due:' .. bucket, it[DUE], member)
    end
    call('SADD', P .. 'buckets', bucket)
  end
end

-- `old` as it is stored, or nil; `it` is stored and indexed in its place.
local function put_item(run_id, item_id, old, it, workflow, paused, popped)
  local moved = not old or popped
  if old and not moved then
    moved = old[DUE] ~= it[DUE] or old[PRIORITY] ~= it[PRIORITY] or old[QUEUE] ~= it[QUEUE] or
      old[KIND] ~= it[KIND] or (old[TOKEN] and old[UNTIL]) ~= (it[TOKEN] and it[UNTIL])
  end
  if moved then
    if old then unplace(run_id, item_id, old, workflow) else items_total = items_total + 1 end
    it[NUMBER] = next_serial()
  end
  call('HSET', P .. 'items:' .. run_id, item_id, cmsgpack.pack(it))
  if moved then place(run_id, item_id, it, workflow, paused) end
end

local function drop_item(run_id, item_id, old, workflow)
  call('HDEL', P .. 'items:' .. run_id, item_id)
  unplace(run_id, item_id, old, workflow)
  items_total = items_total - 1
end

local function set_of(list)
  if not list then return nil end
  local found = {}
  for _, name in ipairs(list) do found[name] = true end
  return found
end

-- The buckets that a claim may look at, those of the highest priority first.
local function matching(queues, workflows, kinds)
  queues, workflows, kinds = set_of(queues), set_of(workflows), set_of(kinds)
  local found = {}
  for _, bucket in ipairs(call('SMEMBERS', P .. 'buckets')) do
    local kind, priority, length, at = string.match(bucket, '^(%a+):(-?%d+):(%d+):()')
    local queue = string.sub(bucket, at, at + length - 1)
    if (not queues or queues[queue]) and (not kinds or kinds[kind]) and
      -- A delivery runs no code of the workflow: any worker may carry it out.
      (not workflows or kind == 'deliver' or workflows[string.sub(bucket, at + length)]) then
      found[#found + 1] = { name = bucket, priority = tonumber(priority) }
    end
  end
  table.sort(found, function(a, b) return a.priority > b.priority end)
  return found
end

-- Items whose lease has ended are free again; without `write` they are left where they are.
local function expire(buckets)
  local changed = false
  for _, bucket in ipairs(buckets) do
    local held, due = P .. 'held:' .. bucket.name, P .. 'due:' .. bucket.name
    repeat
      local over = call('ZRANGEBYSCORE', held, '-inf', now_text, 'LIMIT', 0, 500)
      for _, member in ipairs(over) do
        local run_id, item_id = parse_member(member)
        local it = load_item(run_id, item_id)
        if it then call('ZADD', due, it[DUE], member) end
        call('ZREM', held, member)
        changed = true
      end
    until #over < 500
    if call('EXISTS', held, due) == 0 then
      call('SREM', P .. 'buckets', bucket.name)
      changed = true
    end
  end
  return changed
end

-- Due, free items in the order of claims, `chunk` at a time: {run_id, item_id, item} of each is
-- given to `take`, which returns false to stop.
local function each_due(buckets, chunk, take)
  local first = 1
  while first <= #buckets do
    local last = first
    while last < #buckets and buckets[last + 1].priority == buckets[first].priority do last = last + 1 end
    local offsets, done = {}, {}
    local heads = {}
    local function fill(n)
      local found = call('ZRANGEBYSCORE', P .. 'due:' .. buckets[n].name, '-inf', now_text,
        'WITHSCORES', 'LIMIT', offsets[n], chunk)
      offsets[n] = offsets[n] + #found / 2
      done[n] = #found < chunk * 2
      heads[n] = { at = 1, list = found }
    end
    for n = first, last do
      offsets[n] = 0
      fill(n)
    end
    while true do
      local best, due, member
      for n = first, last do
        local head = heads[n]
        if head.at > #head.list and not done[n] then
          fill(n)
          head = heads[n]
        end
        if head.at <= #head.list then
          local m, d = head.list[head.at], tonumber(head.list[head.at + 1])
          if not best or d < due or (d == due and m < member) then best, due, member = n, d, m end
        end
      end
      if not best then break end
      heads[best].at = heads[best].at + 2
      local run_id, item_id = parse_member(member)
      local it = load_item(run_id, item_id)
      -- The clock may have been set back since the lease ended.
      if it and not unexpired(it) and not take(run_id, item_id, it) then return end
    end
    first = last + 1
  end
end

-- Runs ----------------------------------------------------------------------------------------

-- Lists of runs by number, in whole and per workflow: of each end, of all that are open, and of the
-- open ones in each of these states. Started runs are running or suspended, by their items and the
-- time; nearly all that have not started are pending.
local STATES = { 'stalled', 'paused', 'unstarted', 'started' }

local function state_of(final, stalled, paused, seen)
  if final then return nil end
  return stalled and 'stalled' or paused and 'paused' or tonumber(seen or 0) == 0 and 'unstarted' or 'started'
end

local function list_run(state, number, run_id, workflow)
  call('ZADD', P .. 'runs:' .. state, number, run_id)
  call('ZADD', P .. 'runs:' .. state .. ':' .. workflow, number, run_id)
end

local function unlist_run(state, run_id, workflow)
  call('ZREM', P .. 'runs:' .. state, run_id)
  call('ZREM', P .. 'runs:' .. state .. ':' .. workflow, run_id)
end

-- A row of `final`, `stalled`, `paused`, `seen_seq` as it is stored.
local function list_state(number, run_id, workflow, final, stalled, paused, seen)
  local is = state_of(final, stalled, paused, seen)
  for _, state in ipairs(STATES) do
    if state == is then
      list_run(state, number, run_id, workflow)
    else
      unlist_run(state, run_id, workflow)
    end
  end
end

local function derive(final, stalled, paused, seen, items)
  if final then return final end
  if stalled then return 'stalled' end
  if paused then return 'paused' end
  local leased, claimed, due = false, false, false
  for _, it in pairs(items) do
    if unexpired(it) then leased = true end
    if it[CLAIMS] > 0 then claimed = true end
    if it[KIND] ~= 'deliver' and tonumber(it[DUE]) <= now then due = true end
  end
  if seen == 0 and not leased and not claimed then return 'pending' end
  if leased or due then return 'running' end
  return 'suspended'
end

local function status_of(run_id)
  local row = call('HMGET', P .. 'run:' .. run_id, 'final', 'stalled', 'paused', 'seen_seq')
  if row[1] then return row[1] end
  return derive(nil, row[2], row[3], tonumber(row[4] or 0), (load_items(run_id)))
end

-- The row as a flat list of names and texts, and the status.
local function run_json(run_id, status)
  return '[' .. enc(call('HGETALL', P .. 'run:' .. run_id)) .. ',"' .. (status or status_of(run_id)) .. '"]'
end

-- Events after `after`, `budget` bytes and `most` of them at most: list of texts, bytes.
local function read_events(run_id, after, most, budget, total)
  local key, found, size, chunk = P .. 'events:' .. run_id, {}, 0, 16
  while after < total and #found < most do
    local part = call('LRANGE', key, after, after + math.min(chunk, most - #found) - 1)
    for _, text in ipairs(part) do
      if size + #text > budget then return found, size end
      size = size + #text
      found[#found + 1] = text
    end
    if #part == 0 then break end
    after = after + #part
    -- Large events are fetched few at a time.
    chunk = (size / #found < 4096) and 1000 or 16
  end
  return found, size
end

local function answer(body)
  return '[' .. int(serial) .. ',' .. now_text .. ',' .. body .. ']'
end


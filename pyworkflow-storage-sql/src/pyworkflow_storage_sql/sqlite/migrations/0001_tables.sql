-- Instants are microseconds since 1970-01-01T00:00:00Z. The views show them as text.

create table namespaces (
    id integer primary key,
    name text not null unique,
    name_crc integer not null,                -- a damaged name must not look like no namespace
    clock_offset integer not null default 0,  -- moved by shift_clock, for tests
    latest integer not null default 0,        -- the clock never goes back behind this
    work integer not null default 0           -- counts changes that may give a worker something to do
);

-- What every change of a run touches, and what runs are searched by. Small: it is written again and
-- again.
create table runs (
    id integer primary key autoincrement,     -- in order of creation
    namespace integer not null references namespaces (id),
    run_id text not null,
    workflow text not null,
    version text not null,
    queue text not null,
    priority integer not null,
    idempotency_key text,
    parent_run_id text,
    parent_op text,
    root text,
    next text,
    created_at integer not null,
    started_at integer,
    updated_at integer not null,
    finished_at integer,
    deadline integer,
    last_seq integer not null,
    last_input integer not null,
    seen_seq integer not null,
    paused integer not null,
    stalled text,
    final text,
    create_key text not null,
    answer_token text,                        -- the claim of the last change under a claim,
    answer_key text,                          -- that change's key,
    answer text,                              -- and how it was answered
    unique (namespace, run_id)
);
create index runs_by_final on runs (namespace, final);
create index runs_by_workflow on runs (namespace, workflow, final);
create index runs_by_end on runs (namespace, finished_at) where finished_at is not null;

-- What may be large, and is written once or seldom. JSON.
create table run_data (
    run integer primary key references runs (id),
    args text not null,
    result text,
    error text,
    tags text not null,
    attributes text not null
);

create table events (
    id integer primary key,
    run integer not null references runs (id),
    seq integer not null,
    type text not null,
    class text not null,
    op text,
    key text,
    timestamp integer not null,
    v integer not null,
    data text not null,                       -- JSON
    crc integer not null
);
create unique index events_by_seq on events (run, seq);
create unique index events_by_key on events (run, key) where key is not null;

create table work_items (
    id integer primary key autoincrement,
    run integer not null references runs (id),
    item_id text not null,
    namespace integer not null,
    kind text not null,
    queue text not null,
    workflow text not null,
    priority integer not null,
    parked integer not null,                  -- hidden by the run's pause
    due_at integer not null,
    free_at integer not null,                 -- when it can be claimed: due, or the end of the lease
    claims integer not null,
    owner text,
    token text,
    lease_until integer,
    rung_at integer,
    payload text not null,                    -- JSON
    unique (run, item_id)
);
create index work_free on work_items (namespace, queue, priority desc, due_at)
    where token is null and parked = 0;
create index work_held on work_items (namespace, free_at) where token is not null;

-- Answers to changes, so that a change sent again is answered as it was. Without a token: to a
-- change from outside, kept as long as the run; else the last one under an earlier claim.
create table answers (
    id integer primary key autoincrement,
    run integer not null references runs (id),
    token text,
    key text not null,
    answer text not null                      -- JSON
);
create unique index answers_by_key on answers (run, key) where token is null;
create unique index answers_by_token on answers (run, token) where token is not null;

create table idempotency_keys (
    namespace integer not null,
    key text not null,
    owner text not null,
    until integer,                            -- set when the run was purged
    primary key (namespace, key)
) without rowid;

create view clock as
select
    id as namespace_id,
    name as namespace,
    max(cast((julianday('now') - 2440587.5) * 86400000000.0 as integer), latest) + clock_offset as now
from namespaces;

create view run_status as
select
    c.namespace,
    r.run_id,
    r.workflow,
    r.version,
    case
        when r.final is not null then r.final
        when r.stalled is not null then 'stalled'
        when r.paused then 'paused'
        when exists (select 1 from work_items i where i.run = r.id and i.lease_until > c.now)
            then 'running'
        when r.seen_seq = 0 and not exists (select 1 from work_items i where i.run = r.id and i.claims > 0)
            then 'pending'
        when exists (
            select 1 from work_items i where i.run = r.id and i.due_at <= c.now and i.kind <> 'deliver'
        ) then 'running'
        else 'suspended'
    end as status,
    strftime('%Y-%m-%dT%H:%M:%fZ', r.created_at / 1000000.0, 'unixepoch') as created_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', r.started_at / 1000000.0, 'unixepoch') as started_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', r.updated_at / 1000000.0, 'unixepoch') as updated_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', r.finished_at / 1000000.0, 'unixepoch') as finished_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', r.deadline / 1000000.0, 'unixepoch') as deadline,
    r.queue,
    r.priority,
    r.idempotency_key,
    r.parent_run_id,
    r.parent_op,
    r.root,
    r.next,
    r.last_seq as history_length,
    r.seen_seq,
    r.stalled,
    d.tags,
    d.attributes,
    d.args,
    d.result,
    d.error
from runs r
join clock c on c.namespace_id = r.namespace
join run_data d on d.run = r.id;

create view history as
select
    n.name as namespace,
    r.run_id,
    e.seq,
    e.type,
    e.class,
    e.op,
    e.key,
    strftime('%Y-%m-%dT%H:%M:%fZ', e.timestamp / 1000000.0, 'unixepoch') as timestamp,
    e.v,
    e.data
from events e
join runs r on r.id = e.run
join namespaces n on n.id = r.namespace;

create view owed_work as
select
    c.namespace,
    r.run_id,
    i.item_id,
    i.kind,
    i.workflow,
    i.queue,
    i.priority,
    case
        when i.parked then 'paused'
        when i.lease_until > c.now then 'held'
        when i.due_at <= c.now then 'due'
        else 'waiting'
    end as state,
    strftime('%Y-%m-%dT%H:%M:%fZ', i.due_at / 1000000.0, 'unixepoch') as due_at,
    i.claims,
    i.owner,
    strftime('%Y-%m-%dT%H:%M:%fZ', i.lease_until / 1000000.0, 'unixepoch') as lease_until,
    i.payload
from work_items i
join runs r on r.id = i.run
join clock c on c.namespace_id = i.namespace;

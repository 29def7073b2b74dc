-- The tables of one namespace. Long names stand as a digest and are spelled out in "names".
CREATE TABLE {schema}.store (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    shift interval NOT NULL DEFAULT '0'
);
INSERT INTO {schema}.store DEFAULT VALUES;

-- The latest instant that was given out, in microseconds: the clock never runs backwards. A
-- sequence, because it is outside transactions: nobody waits for it.
CREATE SEQUENCE {schema}.clock;
CREATE SEQUENCE {schema}.numbers;

CREATE TABLE {schema}.runs (
    run_id text COLLATE "C" PRIMARY KEY,
    number bigint NOT NULL,
    workflow text COLLATE "C" NOT NULL,
    version text NOT NULL,
    final text,
    args text NOT NULL,
    result text,
    error json,
    idempotency_key text COLLATE "C",
    parent_run_id text COLLATE "C",
    parent_op text,
    root text COLLATE "C",
    next text COLLATE "C",
    queue text COLLATE "C" NOT NULL,
    priority bigint NOT NULL,
    tags text[] NOT NULL,
    attributes json NOT NULL,
    created_at timestamptz NOT NULL,
    started_at timestamptz,
    updated_at timestamptz NOT NULL,
    finished_at timestamptz,
    deadline timestamptz,
    last_seq bigint NOT NULL,
    last_input bigint NOT NULL,
    seen_seq bigint NOT NULL,
    paused boolean NOT NULL,
    stalled text,
    create_key text COLLATE "C" NOT NULL,
    answer_token text COLLATE "C",
    answer_key text COLLATE "C",
    answer text,
    answers bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX runs_number ON {schema}.runs (number);
CREATE INDEX runs_workflow ON {schema}.runs (workflow, number);
CREATE INDEX runs_final ON {schema}.runs (final, number) WHERE final IS NOT NULL;
CREATE INDEX runs_open ON {schema}.runs (number) WHERE final IS NULL;
CREATE INDEX runs_stalled ON {schema}.runs (number) WHERE stalled IS NOT NULL;
CREATE INDEX runs_paused ON {schema}.runs (number) WHERE paused;
CREATE INDEX runs_finished ON {schema}.runs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX runs_ended ON {schema}.runs (number) WHERE finished_at IS NOT NULL;

CREATE TABLE {schema}.events (
    run_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    "timestamp" timestamptz NOT NULL,
    type text NOT NULL,
    class text NOT NULL,
    op text,
    key text COLLATE "C",
    v bigint NOT NULL,
    data json NOT NULL,
    PRIMARY KEY (run_id, seq)
);
CREATE UNIQUE INDEX events_key ON {schema}.events (run_id, key) WHERE key IS NOT NULL;

CREATE TABLE {schema}.work_items (
    run_id text COLLATE "C" NOT NULL,
    item_id text COLLATE "C" NOT NULL,
    kind text NOT NULL,
    workflow text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    priority bigint NOT NULL,
    due_at timestamptz NOT NULL,
    paused boolean NOT NULL,
    payload json NOT NULL,
    claims bigint NOT NULL,
    owner text,
    token text COLLATE "C",
    lease_until timestamptz,
    rung_at timestamptz,
    number bigint NOT NULL DEFAULT nextval('{schema}.numbers'),
    PRIMARY KEY (run_id, item_id)
) WITH (fillfactor = 70);
CREATE INDEX work_items_due ON {schema}.work_items (priority DESC, due_at, number)
    WHERE NOT paused;
CREATE INDEX work_items_held ON {schema}.work_items (lease_until) WHERE token IS NOT NULL;

-- Answers to changes: place is 'o' and the change's key from outside, 't' and the claim's token.
CREATE TABLE {schema}.answers (
    run_id text COLLATE "C" NOT NULL,
    place text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    key text COLLATE "C" NOT NULL,
    answer text NOT NULL,
    PRIMARY KEY (run_id, place)
);

CREATE TABLE {schema}.idempotency_keys (
    key text COLLATE "C" PRIMARY KEY,
    run_id text COLLATE "C" NOT NULL,
    until timestamptz
);
CREATE INDEX idempotency_keys_until ON {schema}.idempotency_keys (until) WHERE until IS NOT NULL;

CREATE TABLE {schema}.names (
    short text COLLATE "C" PRIMARY KEY,
    name text NOT NULL
);

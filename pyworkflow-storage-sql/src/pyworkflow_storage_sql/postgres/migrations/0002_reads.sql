-- Reading: the clock, runs with their status as objects, events, claims.
CREATE FUNCTION {schema}.instant() RETURNS timestamptz
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    SELECT greatest(clock_timestamp(), timestamptz 'epoch' + c.last_value * interval '1 us') + s.shift
    FROM {schema}.store s, {schema}.clock c WHERE s.one
$$;

-- Called by what writes: no later answer may name an earlier instant.
CREATE FUNCTION {schema}.remember(p_clock timestamptz) RETURNS void
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT setval('{schema}.clock', (extract(epoch FROM p_clock) * 1000000)::bigint)
$$;

CREATE VIEW {schema}.run_status AS
SELECT r.run_id,
    CASE
        WHEN r.final IS NOT NULL THEN r.final
        WHEN r.stalled IS NOT NULL THEN 'stalled'
        WHEN r.paused THEN 'paused'
        WHEN r.seen_seq = 0 AND NOT i.leased AND NOT i.claimed THEN 'pending'
        WHEN i.leased OR i.due THEN 'running'
        ELSE 'suspended'
    END AS status,
    r.number, r.workflow, r.final
FROM {schema}.runs r
CROSS JOIN LATERAL (SELECT CASE WHEN r.final IS NULL THEN {schema}.instant() END AS now OFFSET 0) c
CROSS JOIN LATERAL (
    SELECT coalesce(bool_or(w.lease_until > c.now), false) AS leased,
        coalesce(bool_or(w.claims <> 0), false) AS claimed,
        coalesce(bool_or(w.kind <> 'deliver' AND w.due_at <= c.now), false) AS due
    FROM {schema}.work_items w
    WHERE w.run_id = r.run_id AND r.final IS NULL
) i;

-- A run as one object, after its status. Never looked into here: json operators refuse \u0000.
CREATE FUNCTION {schema}.show_run(p_run_id text, p_now timestamptz) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    v {schema}.runs%ROWTYPE;
    v_status text;
    v_leased boolean; v_claimed boolean; v_due boolean;
BEGIN
    SELECT * INTO v FROM {schema}.runs WHERE run_id = p_run_id;
    IF NOT FOUND THEN RETURN NULL; END IF;
    IF v.final IS NOT NULL THEN v_status := v.final;
    ELSIF v.stalled IS NOT NULL THEN v_status := 'stalled';
    ELSIF v.paused THEN v_status := 'paused';
    ELSE
        SELECT coalesce(bool_or(w.lease_until > p_now), false),
            coalesce(bool_or(w.claims <> 0), false),
            coalesce(bool_or(w.kind <> 'deliver' AND w.due_at <= p_now), false)
        INTO v_leased, v_claimed, v_due
        FROM {schema}.work_items w WHERE w.run_id = p_run_id;
        IF v.seen_seq = 0 AND NOT v_leased AND NOT v_claimed THEN v_status := 'pending';
        ELSIF v_leased OR v_due THEN v_status := 'running';
        ELSE v_status := 'suspended'; END IF;
    END IF;
    v.answer := NULL;
    RETURN json_build_array(v_status, row_to_json(v))::text;
END $$;

CREATE FUNCTION {schema}.show_runs(
    p_below bigint, p_workflow text, p_status text[], p_limit int
) RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    v_now timestamptz := {schema}.instant();
    v_open boolean := p_status IS NULL
        OR p_status && ARRAY['stalled', 'paused', 'pending', 'running', 'suspended'];
    v_ended boolean := p_status IS NULL
        OR p_status && ARRAY['completed', 'failed', 'cancelled', 'terminated', 'continued'];
    v_text text; v_left int := p_limit; r record; v_sql text; v_some text[];
    v_order text := 'number';
BEGIN
    IF p_status <@ ARRAY['stalled', 'paused', 'running'] THEN
        -- Few of the open runs have these, and an index finds them.
        v_some := ARRAY(
            SELECT s.run_id FROM {schema}.runs s
            WHERE 'stalled' = ANY (p_status) AND s.stalled IS NOT NULL
            UNION ALL SELECT s.run_id FROM {schema}.runs s
            WHERE 'paused' = ANY (p_status) AND s.paused
            UNION SELECT w.run_id FROM {schema}.work_items w
            WHERE 'running' = ANY (p_status) AND w.token IS NOT NULL AND w.lease_until > v_now
            UNION SELECT w.run_id FROM {schema}.work_items w
            WHERE 'running' = ANY (p_status) AND NOT w.paused AND w.due_at <= v_now
                AND w.kind <> 'deliver');
    END IF;
    v_sql := 'SELECT run_id FROM {schema}.runs WHERE number < $1';
    IF p_workflow IS NOT NULL THEN v_sql := v_sql || ' AND workflow = $2'; END IF;
    IF NOT v_open AND cardinality(p_status) = 1 THEN v_sql := v_sql || ' AND final = $3[1]';
    ELSIF NOT v_open THEN v_sql := v_sql || ' AND final IS NOT NULL AND final = ANY ($3)';
    ELSIF NOT v_ended THEN
        v_sql := v_sql || ' AND final IS NULL';
        IF v_some IS NOT NULL THEN
            v_sql := v_sql || ' AND run_id = ANY ($4)';
            v_order := 'number + 0';  -- sorted, as the index would have it read all open runs
        END IF;
    ELSIF p_status IS NOT NULL THEN v_sql := v_sql || ' AND (final IS NULL OR final = ANY ($3))';
    END IF;
    FOR r IN EXECUTE v_sql || ' ORDER BY ' || v_order || ' DESC'
        USING p_below, p_workflow, p_status, v_some
    LOOP
        EXIT WHEN v_left <= 0;
        v_text := {schema}.show_run(r.run_id, v_now);
        CONTINUE WHEN v_text IS NULL
            OR (p_status IS NOT NULL AND NOT (split_part(v_text, '"', 2) = ANY (p_status)));
        v_left := v_left - 1;
        RETURN NEXT v_text;
    END LOOP;
END $$;

-- One item as an object.
CREATE FUNCTION {schema}.show_item(p {schema}.work_items) RETURNS json
LANGUAGE sql VOLATILE AS $$
    SELECT json_build_object(
        'run_id', p.run_id, 'item_id', p.item_id, 'kind', p.kind, 'queue', p.queue,
        'priority', p.priority, 'due_at', p.due_at, 'payload', p.payload, 'claims', p.claims,
        'owner', p.owner, 'token', p.token, 'lease_until', p.lease_until, 'rung_at', p.rung_at)
$$;

-- Events after a seq, up to one, as an array.
CREATE FUNCTION {schema}.show_events(p_run_id text, p_after bigint, p_last bigint) RETURNS json
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce(json_agg(row_to_json(e) ORDER BY e.seq), '[]')
    FROM {schema}.events e
    WHERE e.run_id = p_run_id AND e.seq > p_after AND e.seq <= p_last
$$;

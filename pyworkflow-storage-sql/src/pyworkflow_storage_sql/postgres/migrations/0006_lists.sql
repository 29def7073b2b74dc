-- Listings that read one range of an index per status, whatever else is stored.

-- Expressions, so that no other index has the order of number + 0: the planner would choose one of
-- these and filter, whenever it expects to find a page of hits soon.
CREATE INDEX runs_workflow_final ON {schema}.runs (workflow, coalesce(final, ''), (number + 0));
DROP INDEX {schema}.runs_workflow;
-- Changes once in a run's life: an index on seen_seq would change with each turn.
CREATE INDEX runs_unstarted ON {schema}.runs (number) WHERE final IS NULL AND started_at IS NULL;

CREATE OR REPLACE FUNCTION {schema}.show_runs(
    p_below bigint, p_workflow text, p_status text[], p_limit int
) RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    v_now timestamptz := {schema}.instant();
    v_below bigint := p_below; v_left int := p_limit; v_asked int; v_rows int;
    -- Runs with a final status; all open runs; the few of them that an index of their own has.
    v_ended text := CASE WHEN p_workflow IS NULL
        THEN 'r.final = %L AND r.number < $1 ORDER BY r.number'
        ELSE 'r.workflow = $2 AND coalesce(r.final, '''') = %L AND r.number + 0 < $1 ORDER BY r.number + 0' END;
    v_open text := CASE WHEN p_workflow IS NULL
        THEN 'r.final IS NULL AND %s AND r.number < $1 ORDER BY r.number'
        ELSE 'r.workflow = $2 AND coalesce(r.final, '''') = '''' AND %s AND r.number + 0 < $1 '
            || 'ORDER BY r.number + 0' END;
    v_few text := '%s AND r.number < $1'
        || CASE WHEN p_workflow IS NULL THEN '' ELSE ' AND r.workflow = $2' END || ' ORDER BY r.number';
    -- Sorted, and in words that fit no other index: only the one that has just these runs is small.
    v_fewer text := 'coalesce(r.final = '''', true) AND %s AND r.number - $1 < 0'
        || CASE WHEN p_workflow IS NULL THEN '' ELSE ' AND r.workflow = $2' END || ' ORDER BY r.number + 0';
    -- Aggregates, which are worked out for the run alone: EXISTS would be joined to all items.
    v_any text := '(SELECT coalesce(bool_or(%s), false) FROM {schema}.work_items w WHERE w.run_id = r.run_id)';
    v_leased text := format(v_any, 'w.lease_until > $4');
    v_due text := format(v_any, 'w.kind <> ''deliver'' AND w.due_at <= $4');
    v_seen text := '(r.started_at IS NOT NULL OR ' || format(v_any, 'w.claims <> 0') || ')';
    -- The order of derive_status: what is stalled is not paused, and so on.
    v_plain text := 'r.stalled IS NULL AND NOT r.paused AND ';
    v_running text := v_plain || format('(%s OR %s AND %s)', v_leased, v_due, v_seen);
    v_parts text[] := '{}'; v_statuses text[] := p_status; v_some text[]; v_text text; r record;
BEGIN
    IF p_status IS NULL
        OR p_status @> ARRAY['stalled', 'paused', 'pending', 'running', 'suspended'] THEN
        v_parts := v_parts || format(v_open, 'true');
        v_statuses := ARRAY(SELECT s FROM unnest(
                ARRAY['completed', 'failed', 'cancelled', 'terminated', 'continued']) s
            WHERE p_status IS NULL OR s = ANY (p_status));
    END IF;
    IF 'running' = ANY (v_statuses) THEN
        -- Few of the open runs are running, mostly, and indexes of their items find these. Where
        -- many are, the newest runs have them.
        v_some := ARRAY(
            WITH RECURSIVE p AS (
                SELECT max(w.priority) AS priority FROM {schema}.work_items w WHERE NOT w.paused
                UNION ALL
                SELECT (SELECT max(w.priority) FROM {schema}.work_items w
                    WHERE NOT w.paused AND w.priority < p.priority)
                FROM p WHERE p.priority IS NOT NULL)
            SELECT u.run_id FROM (
                SELECT w.run_id FROM {schema}.work_items w
                WHERE w.token IS NOT NULL AND w.lease_until > v_now
                UNION ALL
                SELECT d.run_id FROM p CROSS JOIN LATERAL (
                    SELECT w.run_id FROM {schema}.work_items w
                    WHERE NOT w.paused AND w.priority = p.priority AND w.due_at <= v_now
                    ORDER BY w.due_at, w.number LIMIT 1001) d
            ) u LIMIT 1001);
    END IF;
    v_parts := v_parts || ARRAY(SELECT CASE s
        WHEN 'stalled' THEN format(v_fewer, 'r.stalled IS NOT NULL')
        WHEN 'paused' THEN format(v_fewer, 'r.paused AND r.stalled IS NULL')
        WHEN 'pending' THEN format(v_few, v_plain || 'r.final IS NULL AND r.started_at IS NULL AND NOT '
            || v_leased || ' AND NOT ' || v_seen)
        WHEN 'suspended' THEN format(v_open, v_plain || v_seen || ' AND NOT '
            || v_leased || ' AND NOT ' || v_due)
        WHEN 'running' THEN CASE WHEN cardinality(v_some) <= 1000
            THEN format(v_fewer, 'r.run_id = ANY ($5) AND ' || v_running)
            ELSE format(v_open, v_running) END
        ELSE format(v_ended, s) END
        FROM unnest(v_statuses) s
        WHERE s <> 'running' OR cardinality(v_some) > 0);
    WHILE v_left > 0 AND cardinality(v_parts) > 0 LOOP
        v_asked := v_left;
        v_rows := 0;
        FOR r IN EXECUTE (
            SELECT 'SELECT u.run_id, u.number FROM (' || string_agg(
                '(SELECT r.run_id, r.number FROM {schema}.runs r WHERE ' || part || ' DESC LIMIT $3)',
                ' UNION ALL ') || ') u ORDER BY u.number DESC LIMIT $3'
            FROM unnest(v_parts) part
        ) USING v_below, p_workflow, v_left, v_now, v_some
        LOOP
            v_rows := v_rows + 1;
            v_below := r.number;
            v_text := {schema}.show_run(r.run_id, v_now);
            -- It may have changed since it was found.
            CONTINUE WHEN v_text IS NULL
                OR (p_status IS NOT NULL AND NOT (split_part(v_text, '"', 2) = ANY (p_status)));
            v_left := v_left - 1;
            RETURN NEXT v_text;
        END LOOP;
        EXIT WHEN v_rows < v_asked;
    END LOOP;
END $$;

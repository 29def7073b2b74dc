-- Listings read the runs that they show, whatever else is stored; so do purges that find nothing.

-- What an index can know of a run's status. Runs that have started are running or suspended, by
-- their items and the time; nearly all that have not are pending. number + 0: no other index has
-- this order, or the planner would read that one and filter whenever it expects to find hits soon.
CREATE INDEX runs_state ON {schema}.runs ((coalesce(final, CASE WHEN stalled IS NOT NULL THEN 'stalled'
    WHEN paused THEN 'paused' WHEN started_at IS NULL THEN 'unstarted' ELSE 'started' END)), (number + 0));
CREATE INDEX runs_workflow_state ON {schema}.runs (workflow, (coalesce(final, CASE WHEN stalled IS NOT NULL
    THEN 'stalled' WHEN paused THEN 'paused' WHEN started_at IS NULL THEN 'unstarted' ELSE 'started' END)),
    (number + 0));
DROP INDEX {schema}.runs_final, {schema}.runs_open, {schema}.runs_stalled, {schema}.runs_paused,
    {schema}.runs_unstarted, {schema}.runs_workflow_final, {schema}.runs_ended;
-- Free items that were claimed before. They and the leased ones tell a run that is suspended or
-- running before its first turn was committed from one that is pending.
CREATE INDEX work_items_tried ON {schema}.work_items (run_id) WHERE claims > 0 AND token IS NULL;

CREATE OR REPLACE FUNCTION {schema}.show_runs(
    p_below bigint, p_workflow text, p_status text[], p_limit int
) RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    v_now timestamptz := {schema}.instant();
    v_below bigint := p_below; v_left int := p_limit; v_asked int; v_rows int;
    v_state text := 'coalesce(r.final, CASE WHEN r.stalled IS NOT NULL THEN ''stalled'' '
        || 'WHEN r.paused THEN ''paused'' WHEN r.started_at IS NULL THEN ''unstarted'' ELSE ''started'' END)';
    v_where text := CASE WHEN p_workflow IS NULL THEN '' ELSE 'r.workflow = $2 AND ' END
        || v_state || ' = %L AND r.number + 0 < $1';
    -- All runs of a state; some, of which the ids are known: OFFSET keeps them from being joined.
    v_all text := '{schema}.runs r WHERE ' || v_where;
    v_few text := 'unnest(%s) f (run_id) CROSS JOIN LATERAL (SELECT * FROM {schema}.runs x '
        || 'WHERE x.run_id = f.run_id OFFSET 0) r WHERE ' || v_where;
    -- Aggregates, which are worked out for the run alone: EXISTS would be joined to all items.
    v_any text := '(SELECT coalesce(bool_or(%s), false) FROM {schema}.work_items w WHERE w.run_id = r.run_id)';
    v_leased text := format(v_any, 'w.lease_until > $4');
    v_claimed text := format(v_any, 'w.claims <> 0');
    v_due text := format(v_any, 'w.kind <> ''deliver'' AND w.due_at <= $4');
    v_parts text[] := '{}'; v_awake text[]; v_tried text[]; v_text text; r record;
    v_pending boolean := p_status IS NULL OR 'pending' = ANY (p_status);
    v_running boolean := p_status IS NULL OR 'running' = ANY (p_status);
    v_suspended boolean := p_status IS NULL OR 'suspended' = ANY (p_status);
    v_most int := 1000;  -- where more runs than this are awake, the newest runs have them
BEGIN
    v_parts := ARRAY(SELECT format(v_all, s) FROM unnest(ARRAY['completed', 'failed', 'cancelled',
        'terminated', 'continued', 'stalled', 'paused']) s WHERE p_status IS NULL OR s = ANY (p_status));
    IF v_running AND v_suspended THEN
        v_parts := v_parts || format(v_all, 'started');
    ELSIF v_suspended THEN
        v_parts := v_parts || (format(v_all, 'started') || ' AND NOT ' || v_leased || ' AND NOT ' || v_due);
    ELSIF v_running THEN
        v_awake := ARRAY(
            SELECT DISTINCT u.run_id FROM (
                SELECT u.run_id FROM (
                    SELECT w.run_id FROM {schema}.work_items w
                    WHERE w.token IS NOT NULL
                    UNION ALL
                    SELECT d.run_id FROM {schema}.buckets(NULL, NULL, NULL) b CROSS JOIN LATERAL (
                        SELECT w.run_id FROM {schema}.work_items w
                        WHERE NOT w.paused AND w.token IS NULL AND w.queue = b.o_queue
                            AND w.workflow = b.o_workflow AND w.kind = b.o_kind
                            AND w.priority = b.o_priority
                            AND w.due_at <= v_now LIMIT v_most + 1) d
                    WHERE b.o_due_at <= v_now
                ) u LIMIT v_most + 1) u);
        v_text := ' AND (' || v_leased || ' OR ' || v_due || ')';
        IF cardinality(v_awake) <= v_most THEN
            v_parts := v_parts || (format(v_few, '$5', 'started') || v_text);
        ELSE
            v_parts := v_parts || (format(v_all, 'started') || v_text);
        END IF;
    END IF;
    IF v_pending AND v_running AND v_suspended THEN
        v_parts := v_parts || format(v_all, 'unstarted');
    ELSE
        IF v_pending THEN
            v_parts := v_parts
                || (format(v_all, 'unstarted') || ' AND NOT ' || v_leased || ' AND NOT ' || v_claimed);
        END IF;
        IF v_running OR v_suspended THEN
            v_tried := ARRAY(SELECT DISTINCT u.run_id FROM (
                SELECT u.run_id FROM (
                    SELECT w.run_id FROM {schema}.work_items w WHERE w.token IS NOT NULL
                    UNION ALL
                    SELECT w.run_id FROM {schema}.work_items w WHERE w.claims > 0 AND w.token IS NULL
                ) u LIMIT v_most + 1) u);
            v_text := CASE WHEN cardinality(v_tried) <= v_most THEN format(v_few, '$6', 'unstarted')
                ELSE format(v_all, 'unstarted') END;
            IF v_running THEN
                v_parts := v_parts
                    || (v_text || ' AND (' || v_leased || ' OR ' || v_claimed || ' AND ' || v_due || ')');
            END IF;
            IF v_suspended THEN
                v_parts := v_parts || (v_text || ' AND ' || v_claimed || ' AND NOT ' || v_leased
                    || ' AND NOT ' || v_due);
            END IF;
        END IF;
    END IF;
    WHILE v_left > 0 AND cardinality(v_parts) > 0 LOOP
        v_asked := v_left;
        v_rows := 0;
        FOR r IN EXECUTE (
            SELECT 'SELECT u.run_id, u.number FROM (' || string_agg(
                '(SELECT r.run_id, r.number FROM ' || part || ' ORDER BY r.number + 0 DESC LIMIT $3)',
                ' UNION ALL ') || ') u ORDER BY u.number DESC LIMIT $3'
            FROM unnest(v_parts) part
        ) USING v_below, p_workflow, v_left, v_now, v_awake, v_tried
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

-- Single expressions are replaced. The runs that ended first are removed first.
DO $patch$
DECLARE
    v_text text := pg_get_functiondef('{schema}.purge(timestamptz, int, interval)'::regprocedure);
    v_old text := 'ORDER BY r.number LIMIT p_limit);';
BEGIN
    IF position(v_old IN v_text) = 0 THEN
        RAISE EXCEPTION 'function purge is not the one of the migrations before';
    END IF;
    EXECUTE replace(v_text, v_old, 'ORDER BY r.finished_at LIMIT p_limit);');
END $patch$;

-- Claims and looks for work that read nothing of what waits for others.

-- Free items by queue, workflow, kind and priority. Leased items are few: work_items_held has them.
CREATE INDEX work_items_free ON {schema}.work_items (queue, workflow, kind, priority, due_at, number)
    WHERE NOT paused AND token IS NULL;
DROP INDEX {schema}.work_items_due;

-- The buckets that fit the filters, found by skips, and when the first item of each is due. Called
-- with the settings of functions that set them: setting them takes longer than finding one bucket.
CREATE FUNCTION {schema}.buckets(p_queues text[], p_workflows text[], p_kinds text[])
RETURNS TABLE (o_queue text, o_workflow text, o_kind text, o_priority bigint, o_due_at timestamptz)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_next int := 1;
BEGIN
    LOOP
        IF p_queues IS NOT NULL THEN
            EXIT WHEN v_next > cardinality(p_queues);
            o_queue := p_queues[v_next];
            v_next := v_next + 1;
        ELSE
            SELECT w.queue INTO o_queue FROM {schema}.work_items w
            WHERE NOT w.paused AND w.token IS NULL AND w.queue > coalesce(o_queue, '')
            ORDER BY w.queue LIMIT 1;
            EXIT WHEN NOT FOUND;
        END IF;
        o_workflow := ''; o_kind := ''; o_priority := 0;
        LOOP
            SELECT w.workflow, w.kind, w.priority, w.due_at
            INTO o_workflow, o_kind, o_priority, o_due_at FROM {schema}.work_items w
            WHERE NOT w.paused AND w.token IS NULL AND w.queue = o_queue
                AND (w.workflow, w.kind, w.priority) > (o_workflow, o_kind, o_priority)
            ORDER BY w.workflow, w.kind, w.priority, w.due_at LIMIT 1;
            EXIT WHEN NOT FOUND;
            IF (p_kinds IS NULL OR o_kind = ANY (p_kinds))
                AND (p_workflows IS NULL OR o_kind = 'deliver' OR o_workflow = ANY (p_workflows))
            THEN
                RETURN NEXT;
            END IF;
        END LOOP;
    END LOOP;
END $$;

-- An item that may be claimed, with its place in the order of claims.
CREATE TYPE {schema}.candidate AS (
    priority bigint, due_at timestamptz, number bigint, run_id text, item_id text
);

-- Items that can be claimed, locked. Those that others have locked are passed over. A statement for
-- each bucket: the planner would plan one for all of them in each claim.
CREATE OR REPLACE FUNCTION {schema}.pick_due(
    p_now timestamptz, p_limit int, p_queues text[], p_workflows text[], p_kinds text[],
    p_rung_before timestamptz
) RETURNS SETOF {schema}.work_items
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_left int := p_limit; v_asked int; v_passed bigint[] := '{}'; v_due int := 0;
    v_held {schema}.candidate[]; v_found {schema}.candidate[]; v_some {schema}.candidate[];
    b record; d record; v_item {schema}.work_items%ROWTYPE;
BEGIN
    v_held := ARRAY(
        SELECT ROW(w.priority, w.due_at, w.number, w.run_id, w.item_id)::{schema}.candidate
        FROM {schema}.work_items w
        WHERE w.token IS NOT NULL AND w.lease_until <= p_now AND NOT w.paused AND w.due_at <= p_now
            AND (p_queues IS NULL OR w.queue = ANY (p_queues))
            AND (p_workflows IS NULL OR w.kind = 'deliver' OR w.workflow = ANY (p_workflows))
            AND (p_kinds IS NULL OR w.kind = ANY (p_kinds))
            AND (p_rung_before IS NULL OR w.rung_at IS NULL OR w.rung_at <= p_rung_before));
    FOR b IN SELECT * FROM {schema}.buckets(p_queues, p_workflows, p_kinds) LOOP
        IF b.o_due_at <= p_now THEN
            v_due := v_due + 1;
            d := b;
        END IF;
    END LOOP;
    IF v_due <= 1 AND cardinality(v_held) = 0 AND p_rung_before IS NULL THEN
        IF v_due = 0 OR v_left <= 0 THEN RETURN; END IF;
        RETURN QUERY SELECT * FROM {schema}.work_items w
            WHERE NOT w.paused AND w.token IS NULL AND w.queue = d.o_queue
                AND w.workflow = d.o_workflow AND w.kind = d.o_kind AND w.priority = d.o_priority
                AND w.due_at <= p_now
            ORDER BY w.due_at, w.number LIMIT v_left FOR UPDATE SKIP LOCKED;
        RETURN;
    END IF;
    WHILE v_left > 0 LOOP
        v_asked := v_left;
        v_found := v_held;
        FOR b IN SELECT * FROM {schema}.buckets(p_queues, p_workflows, p_kinds) LOOP
            CONTINUE WHEN b.o_due_at > p_now;
            v_some := ARRAY(
                SELECT ROW(w.priority, w.due_at, w.number, w.run_id, w.item_id)::{schema}.candidate
                FROM (
                    SELECT * FROM {schema}.work_items w
                    WHERE NOT w.paused AND w.token IS NULL AND w.queue = b.o_queue
                        AND w.workflow = b.o_workflow AND w.kind = b.o_kind
                        AND w.priority = b.o_priority
                        AND w.due_at <= p_now AND w.number <> ALL (v_passed)
                    ORDER BY w.due_at, w.number
                    -- Items behind so many that were rung for have their turn when these are claimed.
                    LIMIT CASE WHEN p_rung_before IS NULL THEN v_asked ELSE 2000 END
                ) w
                WHERE p_rung_before IS NULL OR w.rung_at IS NULL OR w.rung_at <= p_rung_before
                ORDER BY w.due_at, w.number LIMIT v_asked);
            v_found := v_found || v_some;
        END LOOP;
        v_found := ARRAY(
            SELECT f FROM unnest(v_found) f WHERE f.number <> ALL (v_passed)
            ORDER BY f.priority DESC, f.due_at, f.number LIMIT v_asked);
        FOR v_item IN
            SELECT w.* FROM unnest(v_found) WITH ORDINALITY f (
                priority, due_at, number, run_id, item_id, place)
            JOIN {schema}.work_items w ON w.run_id = f.run_id AND w.item_id = f.item_id
            -- Others may have changed it.
            WHERE w.number = f.number AND w.due_at <= p_now AND NOT w.paused
                AND (w.token IS NULL OR w.lease_until <= p_now)
            ORDER BY f.place FOR UPDATE OF w SKIP LOCKED
        LOOP
            v_left := v_left - 1;
            RETURN NEXT v_item;
        END LOOP;
        EXIT WHEN cardinality(v_found) < v_asked;
        v_passed := v_passed || ARRAY(SELECT f.number FROM unnest(v_found) f);
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION {schema}.next_due(p_queues text[], p_workflows text[]) RETURNS timestamptz
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $$
DECLARE
    v_first timestamptz; w record;
BEGIN
    SELECT min(b.o_due_at) INTO v_first FROM {schema}.buckets(p_queues, p_workflows, NULL) b;
    FOR w IN
        SELECT h.lease_until, h.due_at FROM {schema}.work_items h
        WHERE h.token IS NOT NULL AND NOT h.paused
            AND (p_queues IS NULL OR h.queue = ANY (p_queues))
            AND (p_workflows IS NULL OR h.kind = 'deliver' OR h.workflow = ANY (p_workflows))
        ORDER BY h.lease_until
    LOOP
        EXIT WHEN v_first <= w.lease_until;
        v_first := least(v_first, greatest(w.lease_until, w.due_at));
    END LOOP;
    RETURN v_first;
END $$;

-- Owners of leases that have not ended; the leases of one. Functions, for their settings: what the
-- planner knows of tokens is out of date when a store was filled just now.
CREATE FUNCTION {schema}.holders() RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
BEGIN
    RETURN QUERY SELECT DISTINCT w.owner FROM {schema}.work_items w
    WHERE w.token IS NOT NULL AND w.lease_until > (SELECT {schema}.instant());
END $$;

CREATE FUNCTION {schema}.leases(p_owner text)
RETURNS TABLE (run_id text, item_id text, token text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
BEGIN
    RETURN QUERY SELECT w.run_id, w.item_id, w.token FROM {schema}.work_items w
    WHERE w.token IS NOT NULL AND w.lease_until > (SELECT {schema}.instant())
        AND w.owner = p_owner;
END $$;

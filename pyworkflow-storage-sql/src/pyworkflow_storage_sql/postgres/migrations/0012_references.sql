-- Claims by reference and renewals read the items that they name. They locked them by a join with
-- the references, in order: with sorts off, or with a plan from when the store was small, that walked
-- all items of the store. One by one there is nothing to plan.

CREATE OR REPLACE FUNCTION {schema}.claim_many(p_requests jsonb)
RETURNS TABLE (o_place int, o_now timestamptz, o_item text, o_run text, o_events text,
    o_after bigint, o_cut boolean)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    q jsonb; ref jsonb; v_shift interval; v_mark bigint; v_lead interval; v_floor timestamptz; v_now timestamptz;
    v_queues text[]; v_workflows text[]; v_kinds text[]; v_found {schema}.work_items[];
    v_item {schema}.work_items%ROWTYPE; v_budget bigint; v_size bigint; v_end bigint;
    v_last bigint; v_wrote boolean := false; v_place int := -1; v_limit int; v_until timestamptz;
BEGIN
    SELECT t.shift, k.last_value, interval '1 us' * CASE
            WHEN timestamptz 'epoch' + (k.last_value - l.last_value - 1000000) * interval '1 us'
                > clock_timestamp() THEN {schema}.gain(k.last_value)
            ELSE l.last_value
        END
    INTO v_shift, v_mark, v_lead
    FROM {schema}.store t, {schema}.clock k, {schema}.lead l WHERE t.one;
    v_floor := timestamptz 'epoch' + v_mark * interval '1 us';
    FOR q IN SELECT value FROM jsonb_array_elements(p_requests) LOOP
        v_place := v_place + 1;
        v_floor := greatest(v_floor, clock_timestamp() + v_lead);
        v_now := v_floor + v_shift;
        v_queues := CASE WHEN q ? 'queues'
            THEN ARRAY(SELECT jsonb_array_elements_text(q->'queues')) END;
        v_workflows := CASE WHEN q ? 'workflows'
            THEN ARRAY(SELECT jsonb_array_elements_text(q->'workflows')) END;
        v_kinds := CASE WHEN q ? 'kinds'
            THEN ARRAY(SELECT jsonb_array_elements_text(q->'kinds')) END;
        v_limit := (q->>'limit')::int; v_budget := (q->>'max_bytes')::bigint;
        v_until := v_now + (q->>'lease')::interval;
        IF q ? 'items' THEN
            -- By reference it waits for who changes the item now; in order, as all who wait do.
            FOR ref IN
                SELECT r.value FROM jsonb_array_elements(q->'items') r
                ORDER BY (r.value->>0) COLLATE "C", (r.value->>1) COLLATE "C"
            LOOP
                PERFORM 1 FROM {schema}.work_items w
                WHERE w.run_id = ref->>0 AND w.item_id = ref->>1 FOR UPDATE;
            END LOOP;
            v_floor := greatest(v_floor, clock_timestamp() + v_lead);
            v_now := v_floor + v_shift;
            v_until := v_now + (q->>'lease')::interval;
            v_found := '{}';
            FOR ref IN SELECT value FROM jsonb_array_elements(q->'items') LOOP
                EXIT WHEN cardinality(v_found) >= v_limit;
                SELECT * INTO v_item FROM {schema}.work_items w
                WHERE w.run_id = ref->>0 AND w.item_id = ref->>1 AND NOT w.paused
                    AND w.due_at <= v_now AND (w.token IS NULL OR w.lease_until <= v_now)
                    AND (v_queues IS NULL OR w.queue = ANY (v_queues))
                    AND (v_kinds IS NULL OR w.kind = ANY (v_kinds))
                    AND (v_workflows IS NULL OR w.kind = 'deliver'
                        OR w.workflow = ANY (v_workflows));
                CONTINUE WHEN NOT FOUND OR EXISTS (
                    SELECT 1 FROM unnest(v_found) f
                    WHERE f.run_id = v_item.run_id AND f.item_id = v_item.item_id);
                v_found := v_found || v_item;
            END LOOP;
        ELSE
            v_found := ARRAY(SELECT d FROM {schema}.pick_due(
                v_now, v_limit, v_queues, v_workflows, v_kinds, NULL) d);
        END IF;
        o_place := v_place; o_now := v_now; o_item := NULL; o_run := NULL; o_events := NULL;
        o_after := 0; o_cut := false;
        IF cardinality(v_found) = 0 THEN RETURN NEXT; END IF;
        FOREACH v_item IN ARRAY v_found LOOP
            v_wrote := true;
            UPDATE {schema}.work_items w SET owner = q->>'owner', token = gen_random_uuid()::text,
                lease_until = v_until, claims = w.claims + 1, rung_at = NULL
            WHERE w.run_id = v_item.run_id AND w.item_id = v_item.item_id
            RETURNING * INTO v_item;
            o_item := {schema}.show_item(v_item)::text;
            o_run := CASE WHEN v_until > v_now THEN {schema}.show_claimed(v_item.run_id)
                ELSE {schema}.show_run(v_item.run_id, v_now) END;
            o_events := NULL; o_after := 0; o_cut := false;
            IF v_item.kind = 'turn' THEN
                SELECT r.last_seq INTO v_last FROM {schema}.runs r WHERE r.run_id = v_item.run_id;
                o_after := coalesce((q->'known'->>v_item.run_id)::bigint, 0);
                IF o_after < 0 OR o_after > v_last THEN o_after := 0; END IF;
                SELECT max(x.seq), max(x.size) INTO v_end, v_size FROM (
                    SELECT y.seq, sum(y.bytes) OVER (ORDER BY y.seq) AS size FROM (
                        SELECT v.seq, 96 + octet_length(v.data::text) AS bytes
                        FROM {schema}.events v
                        WHERE v.run_id = v_item.run_id AND v.seq > o_after AND v.seq <= v_last
                        ORDER BY v.seq LIMIT greatest(v_budget, 0) / 96 + 1
                    ) y
                ) x WHERE x.size <= v_budget;
                v_end := coalesce(v_end, o_after);
                v_budget := v_budget - coalesce(v_size, 0);
                IF v_end > o_after THEN
                    o_events := {schema}.show_events(v_item.run_id, o_after, v_end)::text;
                END IF;
                o_cut := v_end < v_last;
            END IF;
            RETURN NEXT;
        END LOOP;
    END LOOP;
    IF v_wrote THEN PERFORM {schema}.remember(v_floor); END IF;
END $$;

CREATE OR REPLACE FUNCTION {schema}.renew(p_refs jsonb, p_lease interval) RETURNS boolean[]
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    r record; v_kept boolean[] := '{}'; v_now timestamptz;
BEGIN
    FOR r IN
        SELECT value FROM jsonb_array_elements(p_refs)
        ORDER BY (value->>0) COLLATE "C", (value->>1) COLLATE "C"
    LOOP
        PERFORM 1 FROM {schema}.work_items w
        WHERE w.run_id = r.value->>0 AND w.item_id = r.value->>1 FOR UPDATE;
    END LOOP;
    v_now := {schema}.instant();
    FOR r IN SELECT value FROM jsonb_array_elements(p_refs) LOOP
        UPDATE {schema}.work_items w SET lease_until = v_now + p_lease
        WHERE w.run_id = r.value->>0 AND w.item_id = r.value->>1 AND w.token = r.value->>2;
        v_kept := v_kept || FOUND;
    END LOOP;
    RETURN v_kept;
END $$;

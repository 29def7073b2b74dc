-- Removing ended runs, and taking over what another store had.
CREATE FUNCTION {schema}.purge(p_before timestamptz, p_limit int, p_retention interval)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    v_now timestamptz := {schema}.instant(); v_ids text[];
BEGIN
    DELETE FROM {schema}.idempotency_keys k WHERE k.until <= v_now;
    v_ids := ARRAY(
        SELECT r.run_id FROM {schema}.runs r
        WHERE r.finished_at IS NOT NULL AND r.finished_at < p_before
            AND NOT EXISTS (SELECT 1 FROM {schema}.work_items w WHERE w.run_id = r.run_id)
            AND NOT EXISTS (SELECT 1 FROM {schema}.runs p
                WHERE p.run_id = r.parent_run_id AND p.final IS NULL)
        ORDER BY r.number LIMIT p_limit);
    -- Locked in the order of all who lock several; another purge may have been faster.
    v_ids := ARRAY(SELECT r.run_id FROM {schema}.runs r WHERE r.run_id = ANY (v_ids)
        ORDER BY r.run_id FOR UPDATE);
    IF cardinality(v_ids) = 0 THEN RETURN 0; END IF;
    UPDATE {schema}.idempotency_keys k SET until = r.finished_at + p_retention
    FROM {schema}.runs r
    WHERE r.run_id = ANY (v_ids) AND r.idempotency_key IS NOT NULL
        AND k.key = r.idempotency_key AND r.finished_at + p_retention > v_now;
    DELETE FROM {schema}.idempotency_keys k USING {schema}.runs r
    WHERE r.run_id = ANY (v_ids) AND k.key = r.idempotency_key
        AND r.finished_at + p_retention <= v_now;
    DELETE FROM {schema}.events e WHERE e.run_id = ANY (v_ids);
    DELETE FROM {schema}.answers a WHERE a.run_id = ANY (v_ids);
    DELETE FROM {schema}.runs r WHERE r.run_id = ANY (v_ids);
    RETURN cardinality(v_ids);
END $$;

-- Effects as they are: {"parts": [...], "taken": [[key, run_id, until]], "freed": [key]}.
CREATE FUNCTION {schema}.import_delta(p_delta jsonb) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    p jsonb; f jsonb; x jsonb; v_id text; v_run {schema}.runs%ROWTYPE; v_new boolean;
BEGIN
    FOR p IN SELECT value FROM jsonb_array_elements(p_delta->'parts') LOOP
        v_id := p->>'id'; f := p->'set';
        IF p ? 'removed' THEN
            DELETE FROM {schema}.events e WHERE e.run_id = v_id;
            DELETE FROM {schema}.answers a WHERE a.run_id = v_id;
            DELETE FROM {schema}.work_items w WHERE w.run_id = v_id;
            DELETE FROM {schema}.runs r WHERE r.run_id = v_id;
            CONTINUE;
        END IF;
        SELECT * INTO v_run FROM {schema}.runs r WHERE r.run_id = v_id FOR UPDATE;
        v_new := NOT FOUND;
        IF v_new THEN
            v_run.run_id := v_id; v_run.number := nextval('{schema}.numbers');
            v_run.create_key := ''; v_run.workflow := ''; v_run.version := ''; v_run.args := '';
            v_run.queue := 'default'; v_run.priority := 0; v_run.tags := '{}';
            v_run.attributes := '{}'; v_run.created_at := timestamptz 'epoch';
            v_run.updated_at := timestamptz 'epoch'; v_run.seen_seq := 0; v_run.last_seq := 0;
            v_run.last_input := 0; v_run.paused := false; v_run.answers := 0;
            INSERT INTO {schema}.runs SELECT v_run.*;
        END IF;
        IF f ? 'create_key' THEN v_run.create_key := f->>'create_key'; END IF;
        IF f ? 'workflow' THEN v_run.workflow := f->>'workflow'; END IF;
        IF f ? 'version' THEN v_run.version := f->>'version'; END IF;
        IF f ? 'args' THEN v_run.args := f->>'args'; END IF;
        IF f ? 'result' THEN v_run.result := f->>'result'; END IF;
        IF f ? 'error' THEN v_run.error := f->>'error'; END IF;
        IF f ? 'idempotency_key' THEN v_run.idempotency_key := f->>'idempotency_key'; END IF;
        IF f ? 'parent' THEN
            v_run.parent_run_id := f->'parent'->>0; v_run.parent_op := f->'parent'->>1;
        END IF;
        IF f ? 'root' THEN v_run.root := f->>'root'; END IF;
        IF f ? 'next' THEN v_run.next := f->>'next'; END IF;
        IF f ? 'queue' THEN v_run.queue := f->>'queue'; END IF;
        IF f ? 'priority' THEN v_run.priority := (f->>'priority')::bigint; END IF;
        IF f ? 'tags' THEN
            v_run.tags := ARRAY(SELECT jsonb_array_elements_text(f->'tags'));
        END IF;
        IF f ? 'attributes' THEN v_run.attributes := f->>'attributes'; END IF;
        IF f ? 'created_at' THEN v_run.created_at := (f->>'created_at')::timestamptz; END IF;
        IF f ? 'started_at' THEN v_run.started_at := (f->>'started_at')::timestamptz; END IF;
        IF f ? 'updated_at' THEN v_run.updated_at := (f->>'updated_at')::timestamptz; END IF;
        IF f ? 'finished_at' THEN v_run.finished_at := (f->>'finished_at')::timestamptz; END IF;
        IF f ? 'deadline' THEN v_run.deadline := (f->>'deadline')::timestamptz; END IF;
        IF f ? 'seen_seq' THEN v_run.seen_seq := (f->>'seen_seq')::bigint; END IF;
        IF f ? 'paused' THEN v_run.paused := (f->>'paused')::boolean; END IF;
        IF f ? 'stalled' THEN v_run.stalled := f->>'stalled'; END IF;
        IF f ? 'final' THEN v_run.final := f->>'final'; END IF;
        FOR x IN SELECT value FROM jsonb_array_elements(p->'events') LOOP
            CONTINUE WHEN (x->>0)::bigint <= v_run.last_seq;
            IF (x->>0)::bigint <> v_run.last_seq + 1 THEN
                RAISE EXCEPTION 'events are missing' USING ERRCODE = 'PW001',
                    DETAIL = json_build_array(v_id, v_run.last_seq, (x->>0)::bigint)::text;
            END IF;
            INSERT INTO {schema}.events (run_id, seq, "timestamp", type, class, op, key, v, data)
            VALUES (v_id, (x->>0)::bigint, (x->>1)::timestamptz, x->>2, x->>3, x->>4, x->>5,
                (x->>6)::bigint, (x->>7)::json);
            v_run.last_seq := (x->>0)::bigint;
            IF x->>3 = 'I' THEN v_run.last_input := v_run.last_seq; END IF;
        END LOOP;
        DELETE FROM {schema}.work_items w WHERE w.run_id = v_id
            AND w.item_id IN (SELECT jsonb_array_elements_text(p->'gone'));
        FOR x IN SELECT value FROM jsonb_array_elements(p->'items') LOOP
            DELETE FROM {schema}.work_items w WHERE w.run_id = v_id AND w.item_id = x->>0;
            INSERT INTO {schema}.work_items (
                run_id, item_id, kind, workflow, queue, priority, due_at, paused, payload,
                claims, owner, token, lease_until, rung_at
            ) VALUES (
                v_id, x->>0, x->>1, v_run.workflow, x->>2, (x->>3)::bigint,
                (x->>4)::timestamptz, v_run.paused AND x->>1 <> 'deliver', (x->>5)::json,
                (x->>6)::bigint, x->>7, x->>8, (x->>9)::timestamptz, (x->>10)::timestamptz
            );
        END LOOP;
        UPDATE {schema}.work_items w SET paused = v_run.paused AND w.kind <> 'deliver',
            workflow = v_run.workflow
        WHERE w.run_id = v_id AND (f ? 'paused' OR f ? 'workflow');
        FOR x IN SELECT value FROM jsonb_array_elements(p->'records') LOOP
            IF x->>0 IS NULL THEN
                INSERT INTO {schema}.answers (run_id, place, number, key, answer)
                VALUES (v_id, 'o' || (x->>1), 0, x->>1, x->>2)
                ON CONFLICT (run_id, place) DO UPDATE SET answer = excluded.answer;
            ELSE
                DELETE FROM {schema}.answers a WHERE a.run_id = v_id AND a.place = 't' || (x->>0);
                IF v_run.answer_token <> x->>0 THEN
                    v_run.answers := v_run.answers + 1;
                    INSERT INTO {schema}.answers (run_id, place, number, key, answer)
                    VALUES (v_id, 't' || v_run.answer_token, v_run.answers, v_run.answer_key,
                        v_run.answer);
                END IF;
                v_run.answer_token := x->>0; v_run.answer_key := x->>1; v_run.answer := x->>2;
            END IF;
        END LOOP;
        DELETE FROM {schema}.answers a WHERE a.run_id = v_id AND a.place IN (
            SELECT y.place FROM {schema}.answers y WHERE y.run_id = v_id AND y.place LIKE 't%'
            ORDER BY y.number DESC OFFSET 63);
        DELETE FROM {schema}.runs r WHERE r.run_id = v_id;
        INSERT INTO {schema}.runs SELECT v_run.*;
    END LOOP;
    DELETE FROM {schema}.idempotency_keys k
    WHERE k.key IN (SELECT jsonb_array_elements_text(p_delta->'freed'));
    INSERT INTO {schema}.idempotency_keys (key, run_id, until)
    SELECT value->>0, value->>1, (value->>2)::timestamptz
    FROM jsonb_array_elements(p_delta->'taken')
    ON CONFLICT (key) DO UPDATE SET run_id = excluded.run_id, until = excluded.until;
    RETURN NULL;
END $$;

-- The one write path. Each change is accepted or refused alone; what refuses comes before anything
-- is written. The rules are those of pyworkflow.spi.decide, in its order.
CREATE FUNCTION {schema}.commit_many(p_changes jsonb)
RETURNS TABLE (
    o_place int, o_kind text, o_last bigint, o_seen bigint, o_paused boolean,
    o_at timestamptz, o_now timestamptz, o_seqs bigint[], o_skipped int[],
    o_others text, o_claims text, o_detail text
)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    v_shift interval; v_mark bigint; v_floor timestamptz; v_wrote boolean := false;
    -- The change: what the client sends of it, see _postgres_changes.py.
    v_id text; v_key text; v_claim_item text; v_token text; v_asked bigint; v_final text;
    v_control text; v_reason text; v_keys text[]; v_twins boolean; v_input_at int;
    v_moves boolean;
    n jsonb; ev jsonb; u jsonb; d jsonb; s jsonb; p jsonb; t jsonb;
    -- The run and the claimed item as they stand.
    v_ended text; v_last bigint; v_last_input bigint; v_seen bigint; v_was_paused boolean;
    v_was_stalled text; v_updated timestamptz; v_create_key text; v_answer_token text;
    v_answer_key text; v_answers bigint; v_workflow text; v_queue text; v_priority bigint;
    v_kind text; v_held_token text; v_item_claims bigint; v_item_due timestamptz;
    v_item_until timestamptz;
    e jsonb; v_here boolean; v_found boolean; v_count int; v_input bigint; v_standing bigint;
    v_own_keys text[]; v_own_seqs bigint[]; v_touched text[]; v_born text[]; v_held json;
    v_progress boolean; v_fields boolean; v_effects boolean; v_settled_turn boolean;
    v_stalled text; v_soon timestamptz; v_due timestamptz; v_rung timestamptz;
    v_new_token text; v_until timestamptz; v_answer jsonb; v_text text; v_attributes json;
    v_owner text; v_ends timestamptz;
BEGIN
    -- Each expression is set up anew in every transaction, which a lone change pays in full:
    -- the usual change goes through few of them, and what is read is no more than is needed.
    SELECT t.shift, k.last_value INTO v_shift, v_mark
    FROM {schema}.store t, {schema}.clock k WHERE t.one;
    v_floor := timestamptz 'epoch' + v_mark * interval '1 us';
    o_place := -1;
    FOR v_id, v_key, n, v_claim_item, v_token, v_asked, v_final, v_control, v_reason, ev, v_keys,
        v_twins, v_input_at, v_moves, u, d, s, p, t
    IN SELECT * FROM jsonb_to_recordset(p_changes) AS x (
        r text, k text, cr jsonb, ci text, ck text, sn bigint, f text, ct text, cw text, e jsonb,
        ks text[], tw boolean, li int, mv boolean, u jsonb, d jsonb, st jsonb,
        p jsonb, t jsonb)
    LOOP
    o_place := o_place + 1;
    <<attempt>> LOOP
        SELECT r.final, r.last_seq, r.last_input, r.seen_seq, r.paused, r.stalled, r.updated_at,
            r.create_key, r.answer_token, r.answer_key, r.answers, r.workflow, r.queue, r.priority
        INTO v_ended, v_last, v_last_input, v_seen, v_was_paused, v_was_stalled, v_updated,
            v_create_key, v_answer_token, v_answer_key, v_answers, v_workflow, v_queue, v_priority
        FROM {schema}.runs r WHERE r.run_id = v_id FOR UPDATE;
        v_here := FOUND;
        v_floor := greatest(v_floor, clock_timestamp());
        o_now := v_floor + v_shift;

        -- Was it applied before?
        v_text := NULL;
        IF v_here AND n IS NULL THEN
            IF v_answer_token = v_token THEN
                IF v_answer_key = v_key THEN
                    SELECT r.answer INTO v_text FROM {schema}.runs r WHERE r.run_id = v_id;
                END IF;
            ELSIF v_token IS NULL THEN
                SELECT a.answer INTO v_text FROM {schema}.answers a
                WHERE a.run_id = v_id AND a.place = 'o' || v_key;
            ELSIF v_answer_token IS NOT NULL THEN
                SELECT a.answer INTO v_text FROM {schema}.answers a
                WHERE a.run_id = v_id AND a.place = 't' || v_token AND a.key = v_key;
            END IF;
            o_at := greatest(o_now, v_updated);
        ELSIF v_here THEN
            IF v_create_key <> v_key THEN
                o_kind := 'exists'; RETURN NEXT; EXIT attempt;
            END IF;
            SELECT a.answer INTO v_text FROM {schema}.answers a
            WHERE a.run_id = v_id AND a.place = 'o' || v_key;
        ELSIF n IS NULL THEN
            o_kind := 'missing'; RETURN NEXT; EXIT attempt;
        ELSE
            SELECT 0, 0, 0, false, 0, n->>'workflow', n->>'queue', (n->>'priority')::bigint, o_now
            INTO v_last, v_last_input, v_seen, v_was_paused, v_answers, v_workflow, v_queue,
                v_priority, o_at;
        END IF;
        IF v_text IS NOT NULL THEN
            v_answer := v_text::jsonb;
            o_kind := 'again';
            o_last := (v_answer->>0)::bigint; o_seen := (v_answer->>1)::bigint;
            o_paused := (v_answer->>2)::boolean;
            o_at := (v_answer->>3)::timestamptz; o_now := (v_answer->>4)::timestamptz;
            IF jsonb_typeof(v_answer->5) = 'number' THEN
                o_seqs := ARRAY(SELECT generate_series(
                    o_last - (v_answer->>5)::bigint + 1, o_last));
            ELSE
                o_seqs := ARRAY(SELECT value::bigint FROM jsonb_array_elements_text(v_answer->5));
            END IF;
            o_skipped := ARRAY(SELECT value::int FROM jsonb_array_elements_text(v_answer->6));
            o_others := NULL;
            IF v_token IS NOT NULL AND o_last > o_seen THEN
                o_others := {schema}.show_events(v_id, o_seen, o_last)::text;
            END IF;
            SELECT json_agg({schema}.show_item(w) ORDER BY h.place)::text INTO o_claims
            FROM jsonb_array_elements(v_answer->7) WITH ORDINALITY AS h (pair, place)
            JOIN {schema}.work_items w
                ON w.run_id = v_id AND w.item_id = h.pair->>0 AND w.token = h.pair->>1;
            RETURN NEXT; EXIT attempt;
        END IF;

        -- Items that may be touched are locked in their order, as all who lock several do.
        IF v_here AND (v_final IS NOT NULL OR p IS NOT NULL OR d IS NOT NULL
            OR v_control IS NOT NULL OR v_claim_item <> 'turn')
        THEN
            IF v_final IS NOT NULL OR v_control = 'pause' OR v_control = 'unpause' THEN
                PERFORM 1 FROM {schema}.work_items w WHERE w.run_id = v_id
                ORDER BY w.item_id FOR UPDATE;
            ELSE
                v_touched := ARRAY['turn', v_claim_item];
                IF d IS NOT NULL THEN
                    v_touched := v_touched || ARRAY(SELECT jsonb_array_elements_text(d));
                END IF;
                IF p IS NOT NULL THEN
                    v_touched := v_touched
                        || ARRAY(SELECT value->>0 FROM jsonb_array_elements(p));
                END IF;
                PERFORM 1 FROM {schema}.work_items w
                WHERE w.run_id = v_id AND w.item_id = ANY (v_touched)
                ORDER BY w.item_id FOR UPDATE;
            END IF;
        END IF;
        IF v_claim_item IS NULL THEN
            v_kind := NULL;
        ELSE
            SELECT w.kind, w.token, w.claims, w.due_at, w.lease_until
            INTO v_kind, v_held_token, v_item_claims, v_item_due, v_item_until
            FROM {schema}.work_items w
            WHERE w.run_id = v_id AND w.item_id = v_claim_item FOR UPDATE;
        END IF;

        IF v_here THEN
            IF v_ended IS NOT NULL THEN
                IF v_control IS NOT NULL OR v_final IS NOT NULL OR u IS NOT NULL
                    OR v_asked IS NOT NULL OR d IS NOT NULL OR v_moves IS NOT NULL
                    OR (CASE WHEN v_kind IS NOT NULL THEN p IS NOT NULL AND EXISTS (
                            SELECT 1 FROM jsonb_array_elements(p) x
                            WHERE x.value->>1 <> 'deliver')
                        ELSE s IS NOT NULL OR p IS NOT NULL END)
                THEN
                    o_kind := 'closed'; o_detail := v_ended; RETURN NEXT; EXIT attempt;
                END IF;
            END IF;
            IF v_claim_item IS NOT NULL AND v_held_token IS DISTINCT FROM v_token THEN
                o_kind := 'fenced'; o_detail := v_claim_item; RETURN NEXT; EXIT attempt;
            END IF;
            IF v_claim_item IS DISTINCT FROM 'turn'
                AND (v_asked IS NOT NULL OR d IS NOT NULL OR v_control = 'stall')
            THEN
                o_kind := 'fenced'; o_detail := 'turn'; RETURN NEXT; EXIT attempt;
            END IF;
            IF v_control = 'cancel' THEN
                IF (v_seen > 0 AND v_was_stalled IS NULL)
                    OR (v_claim_item IS DISTINCT FROM 'turn' AND EXISTS (
                        SELECT 1 FROM {schema}.work_items w WHERE w.run_id = v_id
                        AND w.item_id = 'turn' AND w.lease_until > o_now))
                THEN
                    o_kind := 'fenced'; o_detail := 'turn'; RETURN NEXT; EXIT attempt;
                END IF;
            END IF;
        END IF;

        -- Number the events, before anything is written. NULL instead of lists: none is skipped.
        o_last := v_last; v_input := v_last_input; o_seqs := NULL; o_skipped := NULL;
        v_progress := false; v_count := 0;
        IF ev IS NOT NULL THEN
            v_count := jsonb_array_length(ev);
            v_found := v_twins IS NOT NULL;
            IF v_here AND v_keys IS NOT NULL THEN
                -- One by one: for a list the planner may read all the run's events instead.
                FOREACH v_text IN ARRAY v_keys LOOP
                    PERFORM 1 FROM {schema}.events x WHERE x.run_id = v_id AND x.key = v_text;
                    IF FOUND THEN v_found := true; EXIT; END IF;
                END LOOP;
            END IF;
            IF NOT v_found THEN
                IF v_moves IS NOT NULL THEN
                    v_progress := true;
                    v_input := coalesce(o_last + v_input_at, v_input);
                END IF;
                o_last := o_last + v_count;
            ELSE
                o_seqs := '{}'; o_skipped := '{}'; v_own_keys := '{}'; v_own_seqs := '{}';
                FOR i IN 0 .. v_count - 1 LOOP
                    e := ev->i;
                    v_text := e->>4;
                    IF v_text IS NOT NULL THEN
                        v_standing := NULL;
                        IF v_here THEN
                            SELECT x.seq INTO v_standing FROM {schema}.events x
                            WHERE x.run_id = v_id AND x.key = v_text;
                        END IF;
                        IF v_standing IS NULL THEN
                            v_standing := v_own_seqs[array_position(v_own_keys, v_text)];
                        END IF;
                        IF v_standing IS NOT NULL THEN
                            o_seqs := o_seqs || v_standing;
                            o_skipped := o_skipped || i;
                            CONTINUE;
                        END IF;
                        v_own_keys := v_own_keys || v_text;
                        v_own_seqs := v_own_seqs || (o_last + 1);
                    END IF;
                    o_last := o_last + 1;
                    o_seqs := o_seqs || o_last;
                    CASE e->>1
                        WHEN 'I' THEN v_input := o_last; v_progress := true;
                        WHEN 'C' THEN v_progress := true;
                        ELSE NULL;
                    END CASE;
                END LOOP;
            END IF;
        END IF;
        o_seen := v_seen;
        IF v_asked IS NOT NULL THEN
            IF v_asked > o_last THEN
                o_kind := 'future'; RETURN NEXT; EXIT attempt;
            END IF;
            IF v_asked > v_seen THEN
                o_seen := v_asked; v_progress := true;
            END IF;
        END IF;
        IF v_final IS NOT NULL AND v_control IS NULL AND v_input > o_seen THEN
            o_kind := 'unseen'; o_last := v_last;
            o_others := {schema}.show_events(v_id, o_seen, v_last)::text;
            RETURN NEXT; EXIT attempt;
        END IF;
        IF n ? 'idempotency_key' THEN
            INSERT INTO {schema}.idempotency_keys (key, run_id)
            VALUES (n->>'idempotency_key', v_id) ON CONFLICT DO NOTHING;
            IF NOT FOUND THEN
                SELECT k.run_id, k.until INTO v_owner, v_ends FROM {schema}.idempotency_keys k
                WHERE k.key = n->>'idempotency_key' FOR UPDATE;
                -- Meanwhile the key may be free again, or the run there: that is asked first.
                CONTINUE attempt WHEN NOT FOUND OR EXISTS (
                    SELECT 1 FROM {schema}.runs r WHERE r.run_id = v_id);
                IF v_ends IS NULL OR v_ends > o_now THEN
                    o_kind := 'taken'; o_detail := v_owner; RETURN NEXT; EXIT attempt;
                END IF;
                -- A tombstone whose time is over.
                UPDATE {schema}.idempotency_keys SET run_id = v_id, until = NULL
                WHERE key = n->>'idempotency_key';
            END IF;
        END IF;
        v_fields := o_last > v_last OR o_seen > v_seen; v_effects := false; v_born := NULL;
        o_paused := v_was_paused; v_stalled := v_was_stalled; v_attributes := NULL;
        IF n IS NOT NULL THEN
            -- Finds out whether it is new; complete, unless it ends at once or is under control.
            INSERT INTO {schema}.runs (
                run_id, number, workflow, version, args, idempotency_key, parent_run_id,
                parent_op, root, queue, priority, tags, attributes, created_at, started_at,
                updated_at, deadline, last_seq, last_input, seen_seq, paused, create_key
            ) VALUES (
                v_id, nextval('{schema}.numbers'), v_workflow, n->>'version', n->>'args',
                n->>'idempotency_key', n->'parent'->>0, n->'parent'->>1, n->>'root', v_queue,
                v_priority, ARRAY(SELECT jsonb_array_elements_text(n->'tags')),
                (n->>'attributes')::json, o_now, CASE WHEN o_seen > 0 THEN o_at END, o_at,
                (n->>'deadline')::timestamptz, o_last, v_input, o_seen, false, v_key
            ) ON CONFLICT DO NOTHING;
            IF NOT FOUND THEN
                IF n ? 'idempotency_key' THEN
                    DELETE FROM {schema}.idempotency_keys k
                    WHERE k.key = n->>'idempotency_key' AND k.run_id = v_id;
                END IF;
                CONTINUE attempt;
            END IF;
            v_effects := true; v_fields := true;
        END IF;

        -- Nothing refuses from here on.
        IF v_control IS NOT NULL THEN
            IF v_control = 'pause' AND NOT o_paused THEN
                o_paused := true; v_fields := true;
            ELSIF v_control = 'unpause' AND o_paused THEN
                o_paused := false; v_fields := true;
            ELSIF v_control = 'stall' AND v_stalled IS DISTINCT FROM v_reason THEN
                v_stalled := v_reason; v_fields := true;
            ELSIF v_control = 'unstall' AND v_stalled IS NOT NULL THEN
                v_stalled := NULL; v_fields := true; v_progress := true;
                UPDATE {schema}.work_items w SET due_at = o_now, rung_at = NULL,
                    number = nextval('{schema}.numbers')
                WHERE w.run_id = v_id AND w.item_id = 'turn' AND w.due_at > o_now;
            END IF;
            IF o_paused <> v_was_paused THEN
                UPDATE {schema}.work_items w SET paused = o_paused
                WHERE w.run_id = v_id AND w.kind <> 'deliver';
                IF NOT o_paused AND v_last_input > v_seen THEN
                    UPDATE {schema}.work_items w SET due_at = o_now, rung_at = NULL,
                        number = nextval('{schema}.numbers')
                    WHERE w.run_id = v_id AND w.item_id = 'turn' AND w.due_at > o_now;
                END IF;
            END IF;
        END IF;
        IF o_last > v_last THEN
            IF o_seqs IS NULL THEN
                INSERT INTO {schema}.events (run_id, seq, "timestamp", type, class, op, key, v, data)
                SELECT v_id, v_last + x.place, o_at, x.value->>0, x.value->>1, x.value->>3,
                    x.value->>4, coalesce((x.value->>5)::bigint, 1), (x.value->>2)::json
                FROM jsonb_array_elements(ev) WITH ORDINALITY AS x (value, place);
            ELSE
                FOR i IN 0 .. v_count - 1 LOOP
                    CONTINUE WHEN i = ANY (o_skipped);
                    e := ev->i;
                    INSERT INTO {schema}.events (
                        run_id, seq, "timestamp", type, class, op, key, v, data
                    ) VALUES (
                        v_id, o_seqs[i + 1], o_at, e->>0, e->>1, e->>3, e->>4,
                        coalesce((e->>5)::bigint, 1), (e->>2)::json
                    );
                END LOOP;
            END IF;
        END IF;
        IF u IS NOT NULL THEN
            v_fields := v_fields OR u <> '{}';
            IF u ? 'attributes' THEN
                SELECT r.attributes INTO v_attributes FROM {schema}.runs r WHERE r.run_id = v_id;
                v_text := u->>'attributes';
                IF position('\u0000' IN v_attributes::text || v_text) > 0 THEN
                    -- json_each cannot show such names; the last of equal names counts.
                    v_attributes := CASE WHEN v_attributes::text = '{}' THEN v_text
                        ELSE left(v_attributes::text, -1) || ', ' || substr(v_text, 2) END;
                ELSE
                    SELECT json_object_agg(y.key, y.value) INTO v_attributes FROM (
                        SELECT DISTINCT ON (x.key) x.key, x.value FROM (
                            SELECT key, value, 0 AS age FROM json_each(v_attributes)
                            UNION ALL SELECT key, value, 1 FROM json_each(v_text::json)
                        ) x ORDER BY x.key, x.age DESC
                    ) y;
                END IF;
            END IF;
        END IF;
        IF d IS NOT NULL THEN
            DELETE FROM {schema}.work_items w WHERE w.run_id = v_id AND w.kind = 'step'
                AND w.item_id IN (SELECT jsonb_array_elements_text(d));
            IF FOUND THEN v_effects := true; END IF;
        END IF;

        IF v_claim_item IS NOT NULL THEN
            v_settled_turn := false;
            IF s IS NULL OR s ? 'keep' THEN
                IF (v_progress AND v_item_claims <> 1) OR s ? 'payload' THEN
                    UPDATE {schema}.work_items w
                    SET claims = CASE WHEN v_progress THEN 1 ELSE w.claims END,
                        payload = CASE WHEN s ? 'payload' THEN (s->>'payload')::json
                            ELSE w.payload END
                    WHERE w.run_id = v_id AND w.item_id = v_claim_item;
                    v_effects := true;
                END IF;
            ELSE
                v_settled_turn := v_kind = 'turn';
                v_effects := true;
                IF s ? 'again' THEN
                    v_progress := v_progress OR s ? 'payload';
                    UPDATE {schema}.work_items w SET owner = NULL, token = NULL,
                        lease_until = NULL, rung_at = NULL, due_at = (s->>'again')::timestamptz,
                        payload = CASE WHEN s ? 'payload' THEN (s->>'payload')::json
                            ELSE w.payload END,
                        claims = CASE WHEN v_progress THEN 0 ELSE w.claims END,
                        number = nextval('{schema}.numbers')
                    WHERE w.run_id = v_id AND w.item_id = v_claim_item;
                ELSE
                    DELETE FROM {schema}.work_items w
                    WHERE w.run_id = v_id AND w.item_id = v_claim_item;
                END IF;
            END IF;
        END IF;

        IF p IS NOT NULL THEN
            FOR e IN SELECT value FROM jsonb_array_elements(p) LOOP
                v_due := coalesce((e->>2)::timestamptz, o_now);
                v_rung := CASE WHEN (e->>6)::boolean THEN o_now END;
                SELECT w.due_at INTO v_ends FROM {schema}.work_items w
                WHERE w.run_id = v_id AND w.item_id = e->>0;
                IF FOUND THEN
                    IF v_due < v_ends THEN
                        UPDATE {schema}.work_items w SET due_at = v_due, rung_at = v_rung,
                            number = nextval('{schema}.numbers')
                        WHERE w.run_id = v_id AND w.item_id = e->>0;
                        v_effects := true;
                    END IF;
                    CONTINUE;
                END IF;
                v_new_token := NULL; v_until := NULL;
                IF e->>7 IS NOT NULL THEN
                    v_new_token := gen_random_uuid()::text;
                    v_until := o_now + (e->>8)::interval;
                    v_rung := NULL;
                    v_born := array_append(v_born, e->>0);
                END IF;
                INSERT INTO {schema}.work_items (
                    run_id, item_id, kind, workflow, queue, priority, due_at, paused, payload,
                    claims, owner, token, lease_until, rung_at
                ) VALUES (
                    v_id, e->>0, e->>1, v_workflow, coalesce(e->>3, v_queue),
                    coalesce((e->>4)::bigint, v_priority), v_due,
                    o_paused AND e->>1 <> 'deliver', (e->>5)::json,
                    CASE WHEN v_new_token IS NULL THEN 0 ELSE 1 END, e->>7, v_new_token,
                    v_until, v_rung
                );
                v_effects := true;
            END LOOP;
        END IF;

        IF v_final IS NOT NULL THEN
            v_fields := true;
            v_stalled := CASE WHEN v_was_stalled IS NULL THEN v_stalled END;
            DELETE FROM {schema}.work_items w WHERE w.run_id = v_id AND w.kind <> 'deliver';
        ELSIF v_ended IS NULL THEN
            IF v_input > o_seen OR t IS NOT NULL THEN
                IF v_claim_item = 'turn' AND s IS NULL AND p IS NULL AND v_control IS NULL THEN
                    v_found := true;  -- nothing has touched it since it was read
                ELSE
                    SELECT w.due_at, w.token, w.lease_until
                    INTO v_item_due, v_held_token, v_item_until
                    FROM {schema}.work_items w WHERE w.run_id = v_id AND w.item_id = 'turn';
                    v_found := FOUND;
                END IF;
                v_soon := CASE WHEN v_stalled IS NULL THEN o_now
                    ELSE o_now + interval '1 second' END;
                IF NOT v_found AND v_input > o_seen THEN
                    -- Born claimed, if it is to be taken at once.
                    v_new_token := NULL; v_until := NULL;
                    IF t IS NOT NULL AND v_stalled IS NULL AND NOT o_paused THEN
                        v_new_token := gen_random_uuid()::text;
                        v_until := o_now + (t->>1)::interval;
                        v_born := array_append(v_born, 'turn');
                    END IF;
                    INSERT INTO {schema}.work_items (
                        run_id, item_id, kind, workflow, queue, priority, due_at, paused,
                        payload, claims, owner, token, lease_until
                    ) VALUES (
                        v_id, 'turn', 'turn', v_workflow, v_queue, v_priority,
                        v_soon, o_paused, '{}', CASE WHEN v_new_token IS NULL THEN 0 ELSE 1 END,
                        CASE WHEN v_new_token IS NOT NULL THEN t->>0 END, v_new_token,
                        v_until
                    );
                    v_effects := true;
                ELSIF v_found THEN
                    IF v_input > o_seen AND v_control IS DISTINCT FROM 'stall'
                        AND (v_input > v_last_input
                            OR (v_settled_turn AND v_stalled IS NULL))
                        AND v_item_due > v_soon
                    THEN
                        UPDATE {schema}.work_items w SET due_at = v_soon, rung_at = NULL,
                            number = nextval('{schema}.numbers')
                        WHERE w.run_id = v_id AND w.item_id = 'turn';
                        v_item_due := v_soon;
                        v_effects := true;
                    END IF;
                    IF t IS NOT NULL AND v_item_due <= o_now AND NOT o_paused
                        AND (v_held_token IS NULL OR v_item_until <= o_now)
                    THEN
                        UPDATE {schema}.work_items w SET claims = w.claims + 1,
                            owner = t->>0, token = gen_random_uuid()::text,
                            lease_until = o_now + (t->>1)::interval, rung_at = NULL
                        WHERE w.run_id = v_id AND w.item_id = 'turn';
                        v_born := array_append(v_born, 'turn');
                        v_effects := true;
                    END IF;
                END IF;
            END IF;
        END IF;

        o_kind := 'done';
        o_others := CASE WHEN v_claim_item IS NOT NULL AND v_last > o_seen
            THEN {schema}.show_events(v_id, o_seen, v_last)::text END;
        o_claims := NULL; v_held := '[]';
        IF v_born IS NOT NULL THEN
            SELECT json_agg({schema}.show_item(w) ORDER BY b.place)::text,
                json_agg(json_build_array(w.item_id, w.token) ORDER BY b.place)
            INTO o_claims, v_held
            FROM unnest(v_born) WITH ORDINALITY AS b (item_id, place)
            JOIN {schema}.work_items w ON w.run_id = v_id AND w.item_id = b.item_id
            WHERE w.token IS NOT NULL;
            v_held := coalesce(v_held, '[]');
        END IF;

        IF v_fields OR v_effects THEN
            v_wrote := true;
            -- A count of seqs says that they are the last ones.
            v_text := json_build_array(o_last, o_seen, o_paused, o_at, o_now,
                coalesce(to_json(o_seqs), to_json(v_count)), coalesce(o_skipped, '{}'), v_held);
            IF v_token IS NULL THEN
                INSERT INTO {schema}.answers (run_id, place, number, key, answer)
                VALUES (v_id, 'o' || v_key, 0, v_key, v_text);
            ELSIF v_answer_token <> v_token THEN
                -- The last token's answer moves over; 64 are kept with the one in the row.
                DELETE FROM {schema}.answers a WHERE a.run_id = v_id AND a.place = 't' || v_token;
                v_answers := v_answers + 1;
                INSERT INTO {schema}.answers (run_id, place, number, key, answer)
                SELECT v_id, 't' || r.answer_token, v_answers, r.answer_key, r.answer
                FROM {schema}.runs r WHERE r.run_id = v_id;
                IF v_answers > 63 THEN
                    DELETE FROM {schema}.answers a WHERE a.run_id = v_id AND a.place IN (
                        SELECT x.place FROM {schema}.answers x
                        WHERE x.run_id = v_id AND x.place LIKE 't%'
                        ORDER BY x.number DESC OFFSET 63);
                END IF;
            END IF;
            IF u IS NOT NULL OR v_control IS NOT NULL OR v_final IS NOT NULL
                OR (n IS NULL AND v_token IS NULL AND v_fields)
            THEN
                UPDATE {schema}.runs r SET
                    updated_at = CASE WHEN v_fields THEN o_at ELSE r.updated_at END,
                    last_seq = o_last, last_input = v_input, seen_seq = o_seen,
                    started_at = CASE WHEN v_seen = 0 AND o_seen > 0 THEN o_at
                        ELSE r.started_at END,
                    paused = o_paused, stalled = v_stalled, final = coalesce(v_final, r.final),
                    finished_at = CASE WHEN v_final IS NULL THEN r.finished_at ELSE o_at END,
                    result = coalesce(u->>'result', r.result),
                    error = coalesce((u->>'error')::json, r.error),
                    next = coalesce(u->>'next', r.next),
                    attributes = coalesce(v_attributes, r.attributes),
                    answer_token = coalesce(v_token, r.answer_token),
                    answer_key = CASE WHEN v_token IS NULL THEN r.answer_key ELSE v_key END,
                    answer = CASE WHEN v_token IS NULL THEN r.answer ELSE v_text END,
                    answers = v_answers
                WHERE r.run_id = v_id;
            ELSIF v_token IS NOT NULL THEN
                UPDATE {schema}.runs r SET
                    updated_at = CASE WHEN v_fields THEN o_at ELSE r.updated_at END,
                    last_seq = o_last, last_input = v_input, seen_seq = o_seen,
                    started_at = CASE WHEN v_seen = 0 AND o_seen > 0 THEN o_at
                        ELSE r.started_at END,
                    answer_token = v_token, answer_key = v_key, answer = v_text,
                    answers = v_answers
                WHERE r.run_id = v_id;
            END IF;
        END IF;
        RETURN NEXT; EXIT attempt;
    END LOOP;
    END LOOP;
    IF v_wrote THEN
        PERFORM setval('{schema}.clock', (extract(epoch FROM v_floor) * 1000000)::bigint);
    END IF;
END $$;

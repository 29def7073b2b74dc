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
    c jsonb; e jsonb; n jsonb; s jsonb; u jsonb; ev jsonb;
    v_run {schema}.runs%ROWTYPE;
    v_item {schema}.work_items%ROWTYPE;
    v_turn {schema}.work_items%ROWTYPE;
    v_id text; v_key text; v_claim_item text; v_token text; v_control text; v_final text;
    v_new boolean; v_now timestamptz; v_at timestamptz; v_place int := -1;
    v_seqs bigint[]; v_skipped int[]; v_own_keys text[]; v_own_seqs bigint[];
    v_last bigint; v_input bigint; v_seen bigint; v_asked bigint; v_standing bigint; v_count int;
    v_progress boolean; v_fields boolean; v_effects boolean; v_settled_turn boolean;
    v_paused boolean; v_stalled text; v_soon timestamptz; v_due timestamptz; v_rung timestamptz;
    v_born text[]; v_touched text[]; v_new_token text; v_until timestamptz; v_claims bigint;
    v_answer jsonb; v_text text; v_held json; v_attributes json; v_owner text; v_ends timestamptz;
    v_is_turn boolean; v_found boolean;
BEGIN
    SELECT t.shift, k.last_value INTO v_shift, v_mark
    FROM {schema}.store t, {schema}.clock k WHERE t.one;
    v_floor := timestamptz 'epoch' + v_mark * interval '1 us';
    FOR c IN SELECT value FROM jsonb_array_elements(p_changes) LOOP
    v_place := v_place + 1;
    v_id := c->>'r'; v_key := c->>'k'; n := c->'cr';
    <<attempt>> LOOP
        SELECT * INTO v_run FROM {schema}.runs WHERE run_id = v_id FOR UPDATE;
        v_found := FOUND;
        v_floor := greatest(v_floor, clock_timestamp());
        v_now := v_floor + v_shift;
        o_place := v_place; o_kind := NULL; o_now := v_now; o_last := NULL; o_seen := NULL;
        o_paused := NULL; o_at := NULL; o_seqs := NULL; o_skipped := NULL;
        o_others := NULL; o_claims := NULL; o_detail := NULL;
        v_claim_item := c->'c'->>0; v_token := c->'c'->>1;
        v_is_turn := v_claim_item IS NOT NULL AND v_claim_item = 'turn';

        -- Was it applied before?
        v_text := NULL;
        IF n IS NOT NULL AND v_found THEN
            IF v_run.create_key <> v_key THEN
                o_kind := 'exists'; RETURN NEXT; EXIT attempt;
            END IF;
            SELECT a.answer INTO v_text FROM {schema}.answers a
            WHERE a.run_id = v_id AND a.place = 'o' || v_key;
        ELSIF n IS NULL THEN
            IF NOT v_found THEN
                o_kind := 'missing'; RETURN NEXT; EXIT attempt;
            END IF;
            IF v_token IS NULL THEN
                SELECT a.answer INTO v_text FROM {schema}.answers a
                WHERE a.run_id = v_id AND a.place = 'o' || v_key;
            ELSIF v_run.answer_token = v_token THEN
                IF v_run.answer_key = v_key THEN v_text := v_run.answer; END IF;
            ELSIF v_run.answer_token IS NOT NULL THEN
                SELECT a.answer INTO v_text FROM {schema}.answers a
                WHERE a.run_id = v_id AND a.place = 't' || v_token AND a.key = v_key;
            END IF;
        END IF;
        IF v_text IS NOT NULL THEN
            v_answer := v_text::jsonb;
            o_kind := 'again';
            o_last := (v_answer->>0)::bigint; o_seen := (v_answer->>1)::bigint;
            o_paused := (v_answer->>2)::boolean;
            o_at := (v_answer->>3)::timestamptz; o_now := (v_answer->>4)::timestamptz;
            o_seqs := ARRAY(SELECT value::bigint FROM jsonb_array_elements_text(v_answer->5));
            o_skipped := ARRAY(SELECT value::int FROM jsonb_array_elements_text(v_answer->6));
            IF v_token IS NOT NULL AND o_last > o_seen THEN
                o_others := {schema}.show_events(v_id, o_seen, o_last)::text;
            END IF;
            SELECT json_agg({schema}.show_item(w) ORDER BY h.place)::text INTO o_claims
            FROM jsonb_array_elements(v_answer->7) WITH ORDINALITY AS h (pair, place)
            JOIN {schema}.work_items w
                ON w.run_id = v_id AND w.item_id = h.pair->>0 AND w.token = h.pair->>1;
            RETURN NEXT; EXIT attempt;
        END IF;

        v_new := n IS NOT NULL;
        ev := c->'e'; u := c->'u'; s := c->'st'; v_final := c->>'f'; v_control := c->'ct'->>0;
        IF v_new THEN
            v_run := NULL;
            v_run.run_id := v_id; v_run.final := NULL; v_run.paused := false;
            v_run.last_seq := 0; v_run.last_input := 0; v_run.seen_seq := 0;
            v_run.workflow := n->>'workflow'; v_run.queue := n->>'queue';
            v_run.priority := (n->>'priority')::bigint; v_run.attributes := n->>'attributes';
            v_run.answers := 0;
            v_at := v_now;
        ELSE
            v_at := greatest(v_now, v_run.updated_at);
        END IF;

        -- Items that may be touched are locked in their order, as all who lock several do.
        v_item := NULL;
        IF v_final IS NOT NULL AND NOT v_new THEN
            PERFORM 1 FROM {schema}.work_items w WHERE w.run_id = v_id
            ORDER BY w.item_id FOR UPDATE;
        ELSIF c ? 'd' OR c ? 'p' OR (v_claim_item IS NOT NULL AND NOT v_is_turn)
            OR v_control = 'pause' OR v_control = 'unpause'
        THEN
            IF v_control IN ('pause', 'unpause') THEN
                PERFORM 1 FROM {schema}.work_items w WHERE w.run_id = v_id
                ORDER BY w.item_id FOR UPDATE;
            ELSIF NOT v_new THEN
                v_touched := ARRAY['turn', v_claim_item];
                IF c ? 'd' THEN
                    v_touched := v_touched || ARRAY(SELECT jsonb_array_elements_text(c->'d'));
                END IF;
                IF c ? 'p' THEN
                    v_touched := v_touched
                        || ARRAY(SELECT value->>0 FROM jsonb_array_elements(c->'p'));
                END IF;
                PERFORM 1 FROM {schema}.work_items w
                WHERE w.run_id = v_id AND w.item_id = ANY (v_touched)
                ORDER BY w.item_id FOR UPDATE;
            END IF;
        END IF;
        IF v_claim_item IS NOT NULL THEN
            SELECT * INTO v_item FROM {schema}.work_items w
            WHERE w.run_id = v_id AND w.item_id = v_claim_item FOR UPDATE;
        END IF;

        IF NOT v_new THEN
            IF v_run.final IS NOT NULL THEN
                IF v_control IS NOT NULL OR v_final IS NOT NULL OR u IS NOT NULL OR c ? 'sn'
                    OR c ? 'd'
                    OR (ev IS NOT NULL AND EXISTS (
                        SELECT 1 FROM jsonb_array_elements(ev) x WHERE x.value->>1 <> 'O'))
                    OR (CASE WHEN v_item.item_id IS NOT NULL THEN c ? 'p' AND EXISTS (
                            SELECT 1 FROM jsonb_array_elements(c->'p') x
                            WHERE x.value->>1 <> 'deliver')
                        ELSE s IS NOT NULL OR c ? 'p' END)
                THEN
                    o_kind := 'closed'; o_detail := v_run.final; RETURN NEXT; EXIT attempt;
                END IF;
            END IF;
            IF v_claim_item IS NOT NULL AND v_item.token IS DISTINCT FROM v_token THEN
                o_kind := 'fenced'; o_detail := v_claim_item; RETURN NEXT; EXIT attempt;
            END IF;
            IF NOT v_is_turn AND (c ? 'sn' OR c ? 'd' OR v_control = 'stall') THEN
                o_kind := 'fenced'; o_detail := 'turn'; RETURN NEXT; EXIT attempt;
            END IF;
            IF v_control = 'cancel' AND (
                (v_run.seen_seq > 0 AND v_run.stalled IS NULL)
                OR (NOT v_is_turn AND EXISTS (
                    SELECT 1 FROM {schema}.work_items w WHERE w.run_id = v_id
                    AND w.item_id = 'turn' AND w.lease_until > v_now)))
            THEN
                o_kind := 'fenced'; o_detail := 'turn'; RETURN NEXT; EXIT attempt;
            END IF;
        END IF;

        -- Number the events, before anything is written.
        v_last := v_run.last_seq; v_input := v_run.last_input; v_seen := v_run.seen_seq;
        v_seqs := '{}'; v_skipped := '{}'; v_own_keys := '{}'; v_own_seqs := '{}';
        v_progress := false; v_fields := false; v_effects := false; v_settled_turn := false;
        v_paused := v_run.paused; v_stalled := v_run.stalled; v_born := '{}';
        IF v_control = 'unstall' AND v_stalled IS NOT NULL THEN v_progress := true; END IF;
        IF ev IS NOT NULL THEN
            v_count := jsonb_array_length(ev);
            FOR i IN 0 .. v_count - 1 LOOP
                e := ev->i;
                v_text := e->>4;
                IF v_text IS NOT NULL THEN
                    v_standing := NULL;
                    IF NOT v_new THEN
                        SELECT x.seq INTO v_standing FROM {schema}.events x
                        WHERE x.run_id = v_id AND x.key = v_text;
                    END IF;
                    IF v_standing IS NULL AND v_count > 1 THEN
                        v_standing := v_own_seqs[array_position(v_own_keys, v_text)];
                    END IF;
                    IF v_standing IS NOT NULL THEN
                        v_seqs := v_seqs || v_standing;
                        v_skipped := v_skipped || i;
                        CONTINUE;
                    END IF;
                    v_own_keys := v_own_keys || v_text; v_own_seqs := v_own_seqs || (v_last + 1);
                END IF;
                v_last := v_last + 1;
                v_seqs := v_seqs || v_last;
                CASE e->>1
                    WHEN 'I' THEN v_input := v_last; v_progress := true;
                    WHEN 'C' THEN v_progress := true;
                    ELSE NULL;
                END CASE;
            END LOOP;
        END IF;
        v_asked := (c->>'sn')::bigint;
        IF v_asked IS NOT NULL THEN
            IF v_asked > v_last THEN
                o_kind := 'future'; o_last := v_last; RETURN NEXT; EXIT attempt;
            END IF;
            IF v_asked > v_seen THEN
                IF v_seen = 0 THEN v_run.started_at := v_at; END IF;
                v_seen := v_asked; v_fields := true; v_progress := true;
            END IF;
        END IF;
        IF v_final IS NOT NULL AND v_control IS NULL AND v_input > v_seen THEN
            o_kind := 'unseen'; o_seen := v_seen; o_last := v_run.last_seq; o_at := v_at;
            o_seqs := v_seqs; o_skipped := v_skipped;
            o_others := {schema}.show_events(v_id, v_seen, v_run.last_seq)::text;
            RETURN NEXT; EXIT attempt;
        END IF;
        IF v_new AND n ? 'idempotency_key' THEN
            INSERT INTO {schema}.idempotency_keys (key, run_id)
            VALUES (n->>'idempotency_key', v_id) ON CONFLICT DO NOTHING;
            IF NOT FOUND THEN
                SELECT k.run_id, k.until INTO v_owner, v_ends FROM {schema}.idempotency_keys k
                WHERE k.key = n->>'idempotency_key' FOR UPDATE;
                -- Meanwhile the key may be free again, or the run there: that is asked first.
                CONTINUE attempt WHEN NOT FOUND OR EXISTS (
                    SELECT 1 FROM {schema}.runs r WHERE r.run_id = v_id);
                IF v_ends IS NULL OR v_ends > v_now THEN
                    o_kind := 'taken'; o_detail := v_owner; RETURN NEXT; EXIT attempt;
                END IF;
                -- A tombstone whose time is over.
                UPDATE {schema}.idempotency_keys SET run_id = v_id, until = NULL
                WHERE key = n->>'idempotency_key';
            END IF;
        END IF;
        IF v_new THEN
            -- Stands for the run until its row is complete, and finds out whether it is new.
            INSERT INTO {schema}.runs (
                run_id, number, workflow, version, args, idempotency_key, parent_run_id,
                parent_op, root, queue, priority, tags, attributes, created_at, updated_at,
                deadline, last_seq, last_input, seen_seq, paused, create_key
            ) VALUES (
                v_id, nextval('{schema}.numbers'), v_run.workflow, n->>'version', n->>'args',
                n->>'idempotency_key', n->'parent'->>0, n->'parent'->>1, n->>'root', v_run.queue,
                v_run.priority, ARRAY(SELECT jsonb_array_elements_text(n->'tags')),
                v_run.attributes, v_now, v_at, (n->>'deadline')::timestamptz, 0, 0, 0, false,
                v_key
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
            IF v_control = 'pause' AND NOT v_paused THEN
                v_paused := true; v_fields := true;
            ELSIF v_control = 'unpause' AND v_paused THEN
                v_paused := false; v_fields := true;
            ELSIF v_control = 'stall' AND v_stalled IS DISTINCT FROM (c->'ct'->>1) THEN
                v_stalled := c->'ct'->>1; v_fields := true;
            ELSIF v_control = 'unstall' AND v_stalled IS NOT NULL THEN
                v_stalled := NULL; v_fields := true;
                UPDATE {schema}.work_items w SET due_at = v_now, rung_at = NULL,
                    number = nextval('{schema}.numbers')
                WHERE w.run_id = v_id AND w.item_id = 'turn' AND w.due_at > v_now;
            END IF;
            IF v_paused <> v_run.paused THEN
                UPDATE {schema}.work_items w SET paused = v_paused
                WHERE w.run_id = v_id AND w.kind <> 'deliver';
                IF NOT v_paused AND v_run.last_input > v_run.seen_seq THEN
                    UPDATE {schema}.work_items w SET due_at = v_now, rung_at = NULL,
                        number = nextval('{schema}.numbers')
                    WHERE w.run_id = v_id AND w.item_id = 'turn' AND w.due_at > v_now;
                END IF;
            END IF;
        END IF;
        IF v_last > v_run.last_seq THEN
            v_fields := true;
            FOR i IN 0 .. v_count - 1 LOOP
                CONTINUE WHEN i = ANY (v_skipped);
                e := ev->i;
                INSERT INTO {schema}.events (run_id, seq, "timestamp", type, class, op, key, v, data)
                VALUES (v_id, v_seqs[i + 1], v_at, e->>0, e->>1, e->>3, e->>4,
                    coalesce((e->>5)::bigint, 1), (e->>2)::json);
            END LOOP;
        END IF;
        IF u IS NOT NULL THEN
            IF u ? 'result' THEN v_run.result := u->>'result'; v_fields := true; END IF;
            IF u ? 'error' THEN v_run.error := (u->>'error')::json; v_fields := true; END IF;
            IF u ? 'next' THEN v_run.next := u->>'next'; v_fields := true; END IF;
            IF u ? 'attributes' THEN
                v_fields := true;
                v_text := u->>'attributes';
                IF position('\u0000' IN v_run.attributes::text || v_text) > 0 THEN
                    -- json_each cannot show such names; the last of equal names counts.
                    v_run.attributes := CASE WHEN v_run.attributes::text = '{}' THEN v_text
                        ELSE left(v_run.attributes::text, -1) || ', ' || substr(v_text, 2) END;
                ELSE
                    SELECT json_object_agg(y.key, y.value) INTO v_attributes FROM (
                        SELECT DISTINCT ON (x.key) x.key, x.value FROM (
                            SELECT key, value, 0 AS age FROM json_each(v_run.attributes)
                            UNION ALL SELECT key, value, 1 FROM json_each(v_text::json)
                        ) x ORDER BY x.key, x.age DESC
                    ) y;
                    v_run.attributes := v_attributes;
                END IF;
            END IF;
        END IF;
        IF c ? 'd' THEN
            DELETE FROM {schema}.work_items w WHERE w.run_id = v_id AND w.kind = 'step'
                AND w.item_id IN (SELECT jsonb_array_elements_text(c->'d'));
            IF FOUND THEN v_effects := true; END IF;
        END IF;

        IF v_claim_item IS NOT NULL THEN
            IF s IS NULL OR s ? 'keep' THEN
                v_claims := CASE WHEN v_progress THEN 1 ELSE v_item.claims END;
                IF v_claims <> v_item.claims OR s ? 'payload' THEN
                    UPDATE {schema}.work_items w SET claims = v_claims,
                        payload = CASE WHEN s ? 'payload' THEN (s->>'payload')::json
                            ELSE w.payload END
                    WHERE w.run_id = v_id AND w.item_id = v_claim_item;
                    v_effects := true;
                END IF;
            ELSE
                v_settled_turn := v_item.kind = 'turn';
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

        IF c ? 'p' THEN
            FOR e IN SELECT value FROM jsonb_array_elements(c->'p') LOOP
                v_due := coalesce((e->>2)::timestamptz, v_now);
                v_rung := CASE WHEN (e->>6)::boolean THEN v_now END;
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
                    v_until := v_now + (e->>8)::interval;
                    v_rung := NULL;
                    v_born := v_born || (e->>0);
                END IF;
                INSERT INTO {schema}.work_items (
                    run_id, item_id, kind, workflow, queue, priority, due_at, paused, payload,
                    claims, owner, token, lease_until, rung_at
                ) VALUES (
                    v_id, e->>0, e->>1, v_run.workflow, coalesce(e->>3, v_run.queue),
                    coalesce((e->>4)::bigint, v_run.priority), v_due,
                    v_paused AND e->>1 <> 'deliver', (e->>5)::json,
                    CASE WHEN v_new_token IS NULL THEN 0 ELSE 1 END, e->>7, v_new_token,
                    v_until, v_rung
                );
                v_effects := true;
            END LOOP;
        END IF;

        IF v_final IS NOT NULL THEN
            v_run.final := v_final; v_run.finished_at := v_at; v_fields := true;
            v_stalled := CASE WHEN v_run.stalled IS NULL THEN v_stalled END;
            DELETE FROM {schema}.work_items w WHERE w.run_id = v_id AND w.kind <> 'deliver';
        ELSIF v_run.final IS NULL THEN
            IF v_input > v_seen OR c ? 't' THEN
                SELECT * INTO v_turn FROM {schema}.work_items w
                WHERE w.run_id = v_id AND w.item_id = 'turn';
                v_found := FOUND;
                v_soon := CASE WHEN v_stalled IS NULL THEN v_now
                    ELSE v_now + interval '1 second' END;
                IF NOT v_found AND v_input > v_seen THEN
                    -- Born claimed, if it is to be taken at once.
                    v_new_token := NULL; v_until := NULL;
                    IF c ? 't' AND v_stalled IS NULL AND NOT v_paused THEN
                        v_new_token := gen_random_uuid()::text;
                        v_until := v_now + (c->'t'->>1)::interval;
                        v_born := v_born || 'turn'::text;
                    END IF;
                    INSERT INTO {schema}.work_items (
                        run_id, item_id, kind, workflow, queue, priority, due_at, paused,
                        payload, claims, owner, token, lease_until
                    ) VALUES (
                        v_id, 'turn', 'turn', v_run.workflow, v_run.queue, v_run.priority,
                        v_soon, v_paused, '{}', CASE WHEN v_new_token IS NULL THEN 0 ELSE 1 END,
                        CASE WHEN v_new_token IS NOT NULL THEN c->'t'->>0 END, v_new_token,
                        v_until
                    );
                    v_effects := true;
                ELSIF v_found THEN
                    IF v_input > v_seen AND v_control IS DISTINCT FROM 'stall'
                        AND (v_input > v_run.last_input
                            OR (v_settled_turn AND v_stalled IS NULL))
                        AND v_turn.due_at > v_soon
                    THEN
                        UPDATE {schema}.work_items w SET due_at = v_soon, rung_at = NULL,
                            number = nextval('{schema}.numbers')
                        WHERE w.run_id = v_id AND w.item_id = 'turn';
                        v_turn.due_at := v_soon;
                        v_effects := true;
                    END IF;
                    IF c ? 't' AND v_turn.due_at <= v_now AND NOT v_paused
                        AND (v_turn.token IS NULL OR v_turn.lease_until <= v_now)
                    THEN
                        UPDATE {schema}.work_items w SET claims = w.claims + 1,
                            owner = c->'t'->>0, token = gen_random_uuid()::text,
                            lease_until = v_now + (c->'t'->>1)::interval, rung_at = NULL
                        WHERE w.run_id = v_id AND w.item_id = 'turn';
                        v_born := v_born || 'turn'::text;
                        v_effects := true;
                    END IF;
                END IF;
            END IF;
        END IF;

        o_kind := 'done'; o_last := v_last; o_seen := v_seen; o_paused := v_paused; o_at := v_at;
        o_seqs := v_seqs; o_skipped := v_skipped;
        IF v_claim_item IS NOT NULL AND v_run.last_seq > v_seen THEN
            o_others := {schema}.show_events(v_id, v_seen, v_run.last_seq)::text;
        END IF;
        v_held := '[]';
        IF v_born <> '{}' THEN
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
            v_text := json_build_array(v_last, v_seen, v_paused, v_at, v_now, v_seqs, v_skipped,
                v_held)::text;
            IF v_token IS NULL THEN
                INSERT INTO {schema}.answers (run_id, place, number, key, answer)
                VALUES (v_id, 'o' || v_key, 0, v_key, v_text);
            ELSE
                IF v_run.answer_token IS NULL THEN
                    NULL;
                ELSIF v_run.answer_token <> v_token THEN
                    -- The last token's answer moves over; 64 are kept with the one in the row.
                    DELETE FROM {schema}.answers a
                    WHERE a.run_id = v_id AND a.place = 't' || v_token;
                    v_run.answers := v_run.answers + 1;
                    INSERT INTO {schema}.answers (run_id, place, number, key, answer)
                    VALUES (v_id, 't' || v_run.answer_token, v_run.answers, v_run.answer_key,
                        v_run.answer);
                    IF v_run.answers > 63 THEN
                        DELETE FROM {schema}.answers a WHERE a.run_id = v_id AND a.place IN (
                            SELECT x.place FROM {schema}.answers x
                            WHERE x.run_id = v_id AND x.place LIKE 't%'
                            ORDER BY x.number DESC OFFSET 63);
                    END IF;
                END IF;
                v_run.answer_token := v_token; v_run.answer_key := v_key; v_run.answer := v_text;
            END IF;
            IF v_fields OR v_token IS NOT NULL THEN
                UPDATE {schema}.runs r SET
                    updated_at = CASE WHEN v_fields THEN v_at ELSE r.updated_at END,
                    last_seq = v_last, last_input = v_input, seen_seq = v_seen,
                    paused = v_paused, stalled = v_stalled, final = v_run.final,
                    started_at = v_run.started_at, finished_at = v_run.finished_at,
                    result = v_run.result, error = v_run.error, next = v_run.next,
                    attributes = v_run.attributes, answer_token = v_run.answer_token,
                    answer_key = v_run.answer_key, answer = v_run.answer,
                    answers = v_run.answers
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

-- Wide runs: what one of a run's many steps costs does not grow with the number of steps.

-- A run of which an item has just been leased: the status needs no look at its other items.
CREATE FUNCTION {schema}.show_claimed(p_run_id text) RETURNS text
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET timezone = 'UTC' AS $$
DECLARE
    v {schema}.runs%ROWTYPE;
BEGIN
    SELECT * INTO v FROM {schema}.runs WHERE run_id = p_run_id;
    IF NOT FOUND THEN RETURN NULL; END IF;
    v.answer := NULL;
    RETURN json_build_array(
        CASE WHEN v.final IS NOT NULL THEN v.final WHEN v.stalled IS NOT NULL THEN 'stalled'
            WHEN v.paused THEN 'paused' ELSE 'running' END,
        row_to_json(v))::text;
END $$;

-- Single expressions of long functions are replaced. commit_many: unseen events are for the holder
-- of the turn alone.
DO $patch$
DECLARE
    v_name text; v_old text; v_new text; v_text text;
BEGIN
    FOR v_name, v_old, v_new IN VALUES (
        'commit_many',
        'IF v_token IS NOT NULL AND o_last > o_seen THEN',
        'IF o_last > o_seen AND (v_claim_item = ''turn'' OR (v_token IS NOT NULL
                AND jsonb_path_exists(v_answer->7, ''$[*] ? (@[0] == "turn")'')))
            THEN'
    ), (
        'commit_many',
        'CASE WHEN v_claim_item IS NOT NULL AND v_last > o_seen',
        'CASE WHEN v_last > o_seen AND (v_claim_item = ''turn''
                OR (v_claim_item IS NOT NULL AND ''turn'' = ANY (v_born)))'
    ), (
        'claim_many',
        'o_run := {schema}.show_run(v_item.run_id, v_now);',
        'o_run := CASE WHEN v_until > v_now THEN {schema}.show_claimed(v_item.run_id)
                ELSE {schema}.show_run(v_item.run_id, v_now) END;'
    ) LOOP
        v_text := pg_get_functiondef(('{schema}.' || v_name || '(jsonb)')::regprocedure);
        IF position(v_old IN v_text) = 0 THEN
            RAISE EXCEPTION 'function % is not the one of the migrations before', v_name;
        END IF;
        EXECUTE replace(v_text, v_old, v_new);
    END LOOP;
END $patch$;

-- The clock continues from its latest reading at the pace of the server's. When that was set back
-- behind the latest reading, `lead` becomes the difference: until now the clock stopped until the
-- server's had caught up. Up to a second it still waits: a clock that is corrected to and fro must
-- not drive this one ahead.

-- By how much the clock is ahead of the server's, in microseconds. A sequence, as `clock` is one.
CREATE SEQUENCE {schema}.lead MINVALUE 0 START WITH 0;

-- Called by what finds the server's clock behind the latest reading. Several may do so at once, and
-- find the same.
CREATE FUNCTION {schema}.gain(p_latest bigint) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_lead bigint := p_latest - (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
BEGIN
    IF current_setting('transaction_read_only') = 'off' THEN
        PERFORM setval('{schema}.lead', v_lead);
    END IF;
    RETURN v_lead;
END $$;

CREATE OR REPLACE FUNCTION {schema}.instant() RETURNS timestamptz
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    SELECT greatest(
        timestamptz 'epoch' + c.last_value * interval '1 us',
        clock_timestamp() + interval '1 us' * CASE
            WHEN timestamptz 'epoch' + (c.last_value - l.last_value - 1000000) * interval '1 us'
                > clock_timestamp() THEN {schema}.gain(c.last_value)
            ELSE l.last_value
        END
    ) + s.shift
    FROM {schema}.store s, {schema}.clock c, {schema}.lead l WHERE s.one
$$;

-- The two functions that read the clock for themselves; each place is replaced.
DO $patch$
DECLARE
    v_name regprocedure; v_text text; v_old text; v_new text;
BEGIN
    FOREACH v_name IN ARRAY ARRAY[
        '{schema}.commit_many(jsonb)'::regprocedure, '{schema}.claim_many(jsonb)'::regprocedure
    ] LOOP
        v_text := pg_get_functiondef(v_name);
        FOR v_old, v_new IN VALUES (
            'v_shift interval; v_mark bigint;',
            'v_shift interval; v_mark bigint; v_lead interval;'
        ), (
            'SELECT t.shift, k.last_value INTO v_shift, v_mark
    FROM {schema}.store t, {schema}.clock k WHERE t.one;',
            'SELECT t.shift, k.last_value, interval ''1 us'' * CASE
            WHEN timestamptz ''epoch'' + (k.last_value - l.last_value - 1000000) * interval ''1 us''
                > clock_timestamp() THEN {schema}.gain(k.last_value)
            ELSE l.last_value
        END
    INTO v_shift, v_mark, v_lead
    FROM {schema}.store t, {schema}.clock k, {schema}.lead l WHERE t.one;'
        ), (
            'v_floor := greatest(v_floor, clock_timestamp());',
            'v_floor := greatest(v_floor, clock_timestamp() + v_lead);'
        ) LOOP
            IF position(v_old IN v_text) = 0 THEN
                RAISE EXCEPTION '% is not the function of the migration before', v_name;
            END IF;
            v_text := replace(v_text, v_old, v_new);
        END LOOP;
        EXECUTE v_text;
    END LOOP;
END $patch$;

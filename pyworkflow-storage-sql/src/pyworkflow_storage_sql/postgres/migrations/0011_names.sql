-- Names are in the columns as they are. 0.1.0 wrote the start and a digest for those of more than
-- 600 bytes, and the name itself into "names". Two names of 1,300 bytes fit into an entry of an
-- index, which may have 2,704: longer names keep their digest, and nothing adds to "names" any more.
DO $names$
DECLARE
    v_table text; v_column text;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM {schema}.names WHERE octet_length(name) <= 1300) THEN RETURN; END IF;
    FOR v_table, v_column IN VALUES
        ('runs', 'run_id'), ('runs', 'workflow'), ('runs', 'idempotency_key'),
        ('runs', 'parent_run_id'), ('runs', 'root'), ('runs', 'next'), ('runs', 'queue'),
        ('runs', 'create_key'), ('runs', 'answer_token'), ('runs', 'answer_key'),
        ('events', 'run_id'), ('events', 'key'),
        ('work_items', 'run_id'), ('work_items', 'item_id'), ('work_items', 'workflow'),
        ('work_items', 'queue'), ('work_items', 'token'),
        ('answers', 'run_id'), ('answers', 'key'),
        ('idempotency_keys', 'key'), ('idempotency_keys', 'run_id')
    LOOP
        EXECUTE format($update$
            UPDATE {schema}.%1$I t SET %2$I = n.name FROM {schema}.names n
            WHERE position(E'\x01\x03' IN t.%2$I) > 0 AND n.short = right(t.%2$I, 64)
                AND octet_length(n.name) <= 1300
            $update$, v_table, v_column);
    END LOOP;
    -- A letter is before the name.
    UPDATE {schema}.answers t SET place = left(t.place, 1) || n.name FROM {schema}.names n
    WHERE position(E'\x01\x03' IN t.place) > 0 AND n.short = right(t.place, 64)
        AND octet_length(n.name) <= 1300;
    -- An answer ends in the items that were claimed with it: [[item, token], ...].
    FOR v_table IN VALUES ('runs'), ('answers') LOOP
        EXECUTE format($update$
            UPDATE {schema}.%1$I t SET answer = json_build_array(
                a->0, a->1, a->2, a->3, a->4, a->5, a->6,
                (SELECT json_agg(
                    json_build_array(coalesce(n.name, h.pair->>0), h.pair->>1) ORDER BY h.place)
                FROM json_array_elements(a->7) WITH ORDINALITY AS h (pair, place)
                LEFT JOIN {schema}.names n ON position(E'\x01\x03' IN h.pair->>0) > 0
                    AND n.short = right(h.pair->>0, 64) AND octet_length(n.name) <= 1300))::text
            FROM (SELECT u.ctid AS place, u.answer::json AS a FROM {schema}.%1$I u
                WHERE position('\u0001\u0003' IN u.answer) > 0) old
            WHERE t.ctid = old.place
            $update$, v_table);
    END LOOP;
    DELETE FROM {schema}.names WHERE octet_length(name) <= 1300;
END $names$;

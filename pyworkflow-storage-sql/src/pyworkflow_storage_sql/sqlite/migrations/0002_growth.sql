-- Indexes without which a purge reads all answers for each run, and all keys once per batch.

-- The two indexes of `answers` are partial: neither serves "all answers of a run".
create index answers_by_run on answers (run);
create index keys_by_end on idempotency_keys (namespace, until) where until is not null;

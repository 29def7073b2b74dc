-- Listings that read one range of an index per open status, whatever else is stored.

create index runs_stalled on runs (namespace) where stalled is not null and final is null;
create index runs_paused on runs (namespace) where paused <> 0 and final is null;
-- Changes once in a run's life: an index on seen_seq would change with each turn.
create index runs_unstarted on runs (namespace) where started_at is null and final is null;

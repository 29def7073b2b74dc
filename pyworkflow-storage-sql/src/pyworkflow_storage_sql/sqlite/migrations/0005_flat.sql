-- Listings and claims that read the rows asked for, whatever else is stored.

-- What an index can know of a run's status. Runs that have started are running or suspended, by
-- their items and the time; nearly all that have not are pending.
create index runs_by_state on runs (namespace, coalesce(final, case when stalled is not null then 'stalled'
    when paused then 'paused' when started_at is null then 'unstarted' else 'started' end));
create index runs_by_workflow_state on runs (namespace, workflow, coalesce(final, case when stalled is not null
    then 'stalled' when paused then 'paused' when started_at is null then 'unstarted' else 'started' end));
drop index runs_by_final;
drop index runs_by_workflow;
drop index runs_stalled;
drop index runs_paused;
drop index runs_unstarted;
-- Free items that were claimed before. They and the leased ones tell a run that is suspended or
-- running before its first turn was committed from one that is pending.
create index work_tried on work_items (namespace, run) where claims > 0 and token is null;

-- Free items by bucket: a worker looks at the heads of the buckets that it serves, not at what
-- waits for others.
drop index work_free;
create index work_free on work_items (namespace, queue, workflow, kind, priority, due_at)
    where token is null and parked = 0;

-- The clock continues from its latest reading at the pace of real time. `latest` alone could only
-- stop it, until a machine's clock that was set back has caught up.

-- What the clock shows, without clock_offset, when the time since the machine's boot is zero.
alter table namespaces add column clock_base integer;
-- The boot that clock_base belongs to. After another boot the clock continues from `latest`.
alter table namespaces add column boot text;
-- How much of the lead over the machine's clock is made up for in clock_offset.
alter table namespaces add column clock_skew integer not null default 0;
-- By how much, without clock_offset, the clock was ahead of the machine's at the last write, for the view.
alter table namespaces add column clock_lead integer not null default 0;

drop view clock;
create view clock as
select
    id as namespace_id,
    name as namespace,
    max(
        cast((julianday('now') - 2440587.5) * 86400000000.0 as integer) + clock_lead,
        latest
    ) + clock_offset as now
from namespaces;

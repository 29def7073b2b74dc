"""Free items by bucket: one of each queue, workflow, kind and priority, found by skips in an index.

SQLite skips to the next bucket by one seek because the lists that are compared end with the latest
instant, for it seeks what equals the list, and because of each ``+``: of a list that is compared
with plain columns it uses the first column alone.
"""

from __future__ import annotations

from typing import Final

__all__ = ["HEADS", "HEADS_OF_QUEUES"]

_FREE: Final = (
    "select i.id from work_items i indexed by work_free "
    "where i.token is null and i.parked = 0 and i.namespace = {namespace}"
)
_LATEST: Final = 2**63 - 1
#: What ``heads (id)`` of a recursive clause selects: the item of each bucket that is due first.
HEADS: Final = f"""
    select * from ({_FREE} order by i.queue, i.workflow, i.kind, i.priority, i.due_at limit 1)
    union all
    select ({_FREE} and (i.queue, i.workflow, i.kind, i.priority, i.due_at)
        > (+w.queue, +w.workflow, +w.kind, +w.priority, {_LATEST})
        order by i.queue, i.workflow, i.kind, i.priority, i.due_at limit 1)
    from heads h cross join work_items w on w.id = h.id"""  # noqa: S608 - constant text
#: The same for some queues, one mark for each. Values: the namespace, the queues, the namespace.
HEADS_OF_QUEUES: Final = f"""
    select ({_FREE} and i.queue = q.column1 order by i.workflow, i.kind, i.priority, i.due_at limit 1)
    from (values {{queues}}) q
    union all
    select ({_FREE} and i.queue = w.queue and (i.workflow, i.kind, i.priority, i.due_at)
        > (+w.workflow, +w.kind, +w.priority, {_LATEST})
        order by i.workflow, i.kind, i.priority, i.due_at limit 1)
    from heads h cross join work_items w on w.id = h.id""".replace("{namespace}", "?")  # noqa: S608 - constant text

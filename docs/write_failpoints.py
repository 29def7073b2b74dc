"""Write ``reference/failpoints.md``, the table of failpoints, from the registry itself.

``python -m docs.write_failpoints``; a test checks that the page is up to date.
"""

# ruff: noqa: INP001 - a script, run from the root of the repository

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from pyworkflow.storekit import failpoints

PAGE = Path(__file__).parent / "reference" / "failpoints.md"
PACKAGES = (
    "pyworkflow",
    "pyworkflow_storage_file",
    "pyworkflow_storage_redis",
    "pyworkflow_storage_sql",
    "pyworkflow_celery",
)
HEAD = """# Failpoints

Named places in the engine, the stores and the Celery plugin at which a test makes a process die,
stop, stall or fail: at that instruction, at that hit, every time. Off by default; a place then
costs one look at a global. They are turned on by the environment variable `PYWORKFLOW_FAILPOINTS`
alone, which a process reads once:

```sh
PYWORKFLOW_FAILPOINTS=turn.after_commit=kill@3 pyworkflow worker my_workflows.py
PYWORKFLOW_FAILPOINTS=pipeline.after_send=raise@2,lease.before_renew=sleep:5 pyworkflow worker …
```

`NAME=ACTION[@N][,…]`: at the N-th hit of this process, at every hit without `@N`.

| action | what happens |
|---|---|
| `kill` | the process gets SIGKILL |
| `exit` | the process ends at once with status 70: nothing is flushed, no `finally` runs |
| `stop` | the process gets SIGSTOP; it goes on with SIGCONT |
| `sleep:SECONDS` | the thread that came there stalls, and with it its event loop |
| `raise` | the exception of the table is raised, as if the system or the store had |

A worker, and a client that starts a run, say loudly that failpoints are on. Wrong syntax, a name
that no module of the process has (the modules of a store are imported when it is used), and
`raise` where nothing can fail are a `ConfigurationError` that lists the names.

A plugin has its own, in its own words:

```python
from pyworkflow.storekit import failpoints

failpoints.register(
    __name__, OSError, {"mystore.before_commit": "a change is written, and not committed"}
)


def commit() -> None:
    if failpoints.active:
        failpoints.hit("mystore.before_commit")
```

`hits()` says how often each place was reached while any is on; `read(text)` is for processes that
fork and cannot have the variable. `tests/e2e/test_crash_loop.py` kills a process at every hit of
every place below and lets another go on.

| failpoint | when | `raise` raises |
|---|---|---|
"""


def all_failpoints() -> Mapping[str, failpoints.Failpoint]:
    """The failpoints of every module of ours, by name."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if "failpoints.register(" in _source(module):
                importlib.import_module(module.name)
    return {
        name: point
        for name, point in failpoints.registered().items()
        if point.module.partition(".")[0] in PACKAGES
    }


def _source(module: pkgutil.ModuleInfo) -> str:
    spec = importlib.util.find_spec(module.name)
    return "" if spec is None or spec.origin is None else Path(spec.origin).read_text("utf-8")


def page() -> str:
    """The page as it should be."""
    rows = [
        f"| `{name}` | {point.meaning} | "
        f"{'' if point.raises is None else f'`{point.raises.__name__}`'} |"
        for name, point in all_failpoints().items()
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

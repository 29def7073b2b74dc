"""For backends whose store is a library in this process: a file, SQLite, LMDB.

Such a store blocks whoever waits for its disk or its locks, and its flush costs the same for one
change as for a hundred. So a backend describes each call as a function of a *batch* (its open
transaction), and a ``Writer`` that does several of them with one flush. The rest is here:

- ``EmbeddedBackend``: who owns the object, and ``close``, ``claim`` and ``watch``;
- ``Dispatcher``: the queue between the event loop and the writer's thread, and the short way of
  small lone operations, without the thread, while ``Pace`` finds flushes to be fast;
- ``Watchers``: who waits for news, by this process or by others;
- ``add_forkable``: what a fork does to all of that.

Nothing else loads this package: a backend behind a network has no use for it.
"""

from pyworkflow.storekit.embedded._backend import FEW, EmbeddedBackend
from pyworkflow.storekit.embedded._clones import Forkable, add_forkable
from pyworkflow.storekit.embedded._dispatch import Dispatcher, nothing
from pyworkflow.storekit.embedded._operations import (
    Answers,
    News,
    Operation,
    Upkeep,
    Writer,
    copy_error,
)
from pyworkflow.storekit.embedded._pace import Pace
from pyworkflow.storekit.embedded._watchers import Watchers

__all__ = [
    "FEW",
    "Answers",
    "Dispatcher",
    "EmbeddedBackend",
    "Forkable",
    "News",
    "Operation",
    "Pace",
    "Upkeep",
    "Watchers",
    "Writer",
    "add_forkable",
    "copy_error",
    "nothing",
]

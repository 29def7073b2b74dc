"""How much the costly checks do here: query plans are tested for each backend, too."""

from __future__ import annotations

import os

#: Runs of COST-01; the suite's own number under ``PYWORKFLOW_FULL=1``.
MANY_RUNS = 20_000 if os.environ.get("PYWORKFLOW_FULL") == "1" else 5_000

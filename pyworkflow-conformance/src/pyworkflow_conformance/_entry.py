"""What pytest collects when the suite is run by URL: one class, made by ``run_conformance``."""

from __future__ import annotations

from pyworkflow_conformance._run import current_suite

TestStore = current_suite()

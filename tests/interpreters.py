"""Test files that have the same outcome on every Python, and so run on the oldest one alone.

Everything else runs on every Python, a new file too: values and annotations, codecs, the guard and
determinism, event loops, threads, signals, forks, the replay of old histories, the cases, and the
base level of the conformance suite on every backend. A file is listed here once it costs seconds and
none of its tests depends on the interpreter. A file that is named to pytest runs all the same.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["HERE", "SAME", "on_this_python"]

HERE = Path(__file__).parent
#: What `tox.ini` sets for Pythons newer than the oldest.
ASKED = os.environ.get("PYWORKFLOW_TESTS") == "interpreter"

#: Why → files, below ``tests``.
SAME: dict[str, tuple[str, ...]] = {
    "brokers, workers that are killed and stores that fail; test_pools.py starts every pool": (
        "celery/test_amqp.py",
        "celery/test_bad_input.py",
        "celery/test_beat.py",
        "celery/test_children.py",
        "celery/test_ends.py",
        "celery/test_failpoints.py",
        "celery/test_faults.py",
        "celery/test_hard_timeout.py",
        "celery/test_hooks.py",
        "celery/test_insistence.py",
        "celery/test_messages.py",
        "celery/test_silence.py",
        "celery/test_starved.py",
        "celery/test_steps_that_wait.py",
        "celery/test_stores.py",
        "celery/test_threads.py",
        "celery/test_ways.py",
        "applications/test_resources_on_celery.py",
        "conformance/test_executor_celery.py",
    ),
    "processes that are killed: what is left is data of a store, which every Python reads alike": (
        "e2e/test_crash_loop.py",
        "e2e/test_fault_doorbells.py",
        "e2e/test_fault_races.py",
        "e2e/test_fault_starts.py",
        "e2e/test_fault_values.py",
        "e2e/test_kill.py",
        "e2e/test_poison.py",
        "e2e/test_servers.py",
        "e2e/test_storage_bad_input.py",
        "e2e/test_storage_faults.py",
        "e2e/test_storage_kill.py",
        "plugins/pyworkflow-storage-file/test_crash.py",
        "plugins/pyworkflow-storage-redis/test_faults.py",
        "plugins/pyworkflow-storage-sql/test_postgres_faults.py",
    ),
    "what reading costs, and rules and plans in the server: Lua and SQL": (
        "core/test_listing.py",
        "plugins/pyworkflow-storage-file/test_packs.py",
        "plugins/pyworkflow-storage-redis/test_clock.py",
        "plugins/pyworkflow-storage-redis/test_equals_reference.py",
        "plugins/pyworkflow-storage-redis/test_redis_lists.py",
        "plugins/pyworkflow-storage-redis/test_redis_wide_runs.py",
        "plugins/pyworkflow-storage-sql/test_postgres_clock.py",
        "plugins/pyworkflow-storage-sql/test_postgres_many.py",
        "plugins/pyworkflow-storage-sql/test_postgres_plans.py",
        "plugins/pyworkflow-storage-sql/test_postgres_pooled.py",
        "plugins/pyworkflow-storage-sql/test_postgres_rules.py",
        "plugins/pyworkflow-storage-sql/test_postgres_tables.py",
        "plugins/pyworkflow-storage-sql/test_sql_wide_runs.py",
    ),
    "the conformance suite itself: that it finds broken backends": (
        "conformance/broken/test_conduct.py",
        "conformance/broken/test_executor_suite_bites.py",
        "conformance/broken/test_planted.py",
        "conformance/broken/test_suite_bites.py",
        "conformance/test_layers_bite.py",
        "simulation/test_bites.py",
        "simulation/test_simulation.py",
    ),
    "commands of operators, a process for each; test_cli_values.py starts the command line": (
        "core/test_cli.py",
        "core/test_conformance_cli.py",
        "core/test_conformance_reports.py",
        "core/test_file_modes.py",
        "core/test_storage_clock.py",
        "core/test_storage_commands.py",
        "devops/test_commands.py",
        "devops/test_dev.py",
        "devops/test_manifests.py",
    ),
    "files of the repository: documents, and packages that are built from it": (
        "applications/test_sentry_page.py",
        "repo/test_events_doc.py",
        "repo/test_examples.py",
        "repo/test_failpoints_doc.py",
        "repo/test_fault_matrix.py",
        "repo/test_hooks_doc.py",
        "repo/test_layers.py",
        "repo/test_peers.py",
        "repo/test_readme.py",
        "repo/test_run_readme.py",
        "repo/test_server_guide.py",
        "repo/test_spi_doc.py",
        "repo/test_third_party.py",
        "repo/test_transitions_doc.py",
    ),
}
_FILES = frozenset(HERE / name for names in SAME.values() for name in names)


def on_this_python(path: Path) -> bool:
    """Whether a test file belongs to this run."""
    return not (ASKED and path in _FILES)

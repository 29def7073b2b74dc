"""The list of test files that run on the oldest Python alone."""

from __future__ import annotations

from collections import Counter

from tests.interpreters import HERE, SAME

#: What must run on every Python, whatever it costs.
EVERYWHERE = (
    *("celery/test_pools.py", "core/test_blocking.py", "core/test_codecs.py"),
    *("core/test_engine.py", "core/test_golden.py", "core/test_keeper.py"),
    *("core/test_ops_table.py", "core/test_replay_property.py", "core/test_serialization.py"),
    *("core/test_values_annotations.py", "core/test_values_calls.py"),
    *("core/test_values_scripts.py", "core/test_values_state.py"),
    *("conformance/test_executor_local.py", "conformance/test_file.py"),
    *("conformance/test_memory.py", "conformance/test_postgres.py"),
    *("conformance/test_redis.py", "conformance/test_sqlite.py"),
    *("e2e/test_second_signal.py", "e2e/test_stores_of_0_1_0.py"),
    *("plugins/pyworkflow-celery/test_worker.py", "repo/test_cases.py"),
)


def test_every_listed_file_exists_and_is_listed_once() -> None:
    listed = Counter(name for names in SAME.values() for name in names)
    assert [name for name in listed if not (HERE / name).is_file()] == []
    assert [name for name, times in listed.items() if times > 1] == []


def test_what_depends_on_the_interpreter_runs_on_every_python() -> None:
    listed = {name for names in SAME.values() for name in names}
    assert [name for name in EVERYWHERE if not (HERE / name).is_file()] == []
    assert listed.isdisjoint(EVERYWHERE)

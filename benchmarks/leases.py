"""How well leases are kept while steps compute or keep the interpreter's lock.

``python -m benchmarks.leases repeat`` runs the test of a computing step many times in a row.
``python -m benchmarks.leases matrix`` runs steps that keep the lock, in each pool of Celery and in
the embedded worker, and says which kept a lease of 10 s. ``--busy 4`` loads the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.celery import _program
from tests.celery._harness import Fleet, fleet_on, new_tag

TEST: Final = (
    "tests/celery/test_pools.py::test_f15_a_computing_step_keeps_its_lease_beyond_its_time"
)
POOLS: Final = ("prefork", "threads", "solo", "embedded")
HOLDS_S: Final = (0.01, 0.1, 0.5, 2.0, 5.0)
LEASE_S: Final = 10.0
TOTAL_S: Final = 2.5 * LEASE_S
_SPIN: Final = "while True: sum(range(100_000))"
_EMBEDDED: Final = f"""
import sys
import pyworkflow
from {_program.__name__} import starved
pyworkflow.configure_logging()
pyworkflow.run(starved, sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
"""


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that compute."""
    spinners = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(number)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def repeat(times: int) -> int:
    """Run the test so often; how often it failed."""
    failed, loads = 0, []
    for number in range(1, times + 1):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        loads.append(os.getloadavg()[0])
        if ended.returncode:
            failed += 1
            print(ended.stdout[-6000:])
        outcome = "FAILED" if ended.returncode else "passed"
        print(f"{number:3} {outcome} load={loads[-1]:.1f}", flush=True)
    print(f"runs={times} failed={failed} load={min(loads):.1f}..{max(loads):.1f}")
    return failed


def matrix(pools: Sequence[str], holds: Sequence[float]) -> int:
    """Say which steps kept their lease; how many did not."""
    lost = 0
    for pool in pools:
        with (
            tempfile.TemporaryDirectory(prefix="pyworkflow-leases-") as folder,
            fleet_on(Path(folder)) as fleet,
        ):
            measure = _embedded if pool == "embedded" else _celery
            counts = measure(fleet, pool, holds)
            if set(counts.values()) != {1}:
                print(fleet.logs()[-20_000:])
        for hold, count in counts.items():
            lost += count != 1
            outcome = "kept" if count == 1 else f"LOST, {count} executions"
            load = os.getloadavg()[0]
            print(f"{pool:9} hold={hold * 1000:5.0f} ms  {outcome}  load={load:.1f}", flush=True)
    return lost


def _settings() -> dict[str, str]:
    return {
        "PYWORKFLOW_LEASE": f"{LEASE_S}s",
        "PYWORKFLOW_RENEW_EVERY": f"{LEASE_S / 3}s",
        "PYWORKFLOW_CONCURRENCY": "1",
    }


def _celery(fleet: Fleet, pool: str, holds: Sequence[float]) -> dict[float, int]:
    """Executions by hold: a worker with one slot for each, and one more that is idle."""
    workers = [fleet.begin(pool=pool, concurrency=1, **_settings()) for _ in (*holds, None)]
    fleet.eventually(lambda: all(worker.ready for worker in workers), "the workers")
    tags = {hold: new_tag() for hold in holds}
    runs = [fleet.start(_program.starved, hold, TOTAL_S, tag=tags[hold]) for hold in holds]
    _wait_for(fleet, runs)
    return {hold: fleet.executions(tag)["holding"] for hold, tag in tags.items()}


def _embedded(fleet: Fleet, _pool: str, holds: Sequence[float]) -> dict[float, int]:
    """Executions by hold: a script for each, and a worker that would take over what it loses.

    Each has a namespace: a script works on all runs of its own, and ends with its own run.
    """
    tags = {hold: new_tag() for hold in holds}
    scripts, workers = [], []
    try:
        for number, hold in enumerate(holds):
            env = fleet.environment(
                PYWORKFLOW_EXECUTOR="local://", PYWORKFLOW_NAMESPACE=f"n{number}", **_settings()
            )
            words = ["-c", _EMBEDDED, tags[hold], str(hold), str(TOTAL_S)]
            scripts.append(_process(fleet, words, env))
            fleet.begun(tags[hold], "holding")
            words = ["-m", "pyworkflow.cli", "worker", _program.__name__]
            workers.append(_process(fleet, words, env))
        for script in scripts:
            script.wait(4 * TOTAL_S)
    finally:
        for process in (*scripts, *workers):
            process.kill()
            process.wait()
    return {hold: fleet.executions(tag)["holding"] for hold, tag in tags.items()}


def _process(fleet: Fleet, words: Sequence[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    with (fleet.path / "embedded.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *words], env=env, cwd=fleet.path, stdout=log, stderr=log
        )


def _wait_for(fleet: Fleet, runs: Sequence[str]) -> None:
    end = time.monotonic() + 4 * TOTAL_S
    while not all(fleet.run(run_id).status.is_terminal for run_id in runs):
        if time.monotonic() > end:
            raise SystemExit(f"not all runs end\n{fleet.logs()[-8000:]}")
        time.sleep(0.5)


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leases", description=__doc__)
    parser.add_argument("what", choices=("repeat", "matrix"))
    parser.add_argument("--times", type=int, default=50, help="of repeat")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--pool", action="append", choices=POOLS, help="of matrix; all by default")
    parser.add_argument("--hold", action="append", type=float, help="of matrix: seconds")
    given = parser.parse_args()
    print(f"cpus={os.cpu_count()} busy={given.busy} load={os.getloadavg()[0]:.1f}", flush=True)
    with busy(given.busy):
        if given.what == "repeat":
            failed = repeat(given.times)
        else:
            failed = matrix(given.pool or POOLS, given.hold or HOLDS_S)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

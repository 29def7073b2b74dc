"""Eight processes that open a store at once: for MIG-08, and before all checks of a URL.

Imports no check: a run by URL needs it before pytest has prepared them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

__all__ = ["OPENERS", "TEST", "by_processes", "run_id_of"]

#: The check, as its test is called.
TEST = "test_MIG_08_eight_openers_of_nothing"
OPENERS = 8
#: Seconds after which an opener is killed.
PATIENCE = 90.0
_SCRIPT = str(Path(__file__).with_name("_worker.py"))


def run_id_of(opener: int) -> str:
    """The run that an opener starts."""
    return f"run-{opener}"


def by_processes(url: str, namespaces: Sequence[str]) -> list[str]:
    """Let eight processes open the store at once, each start a run; what became of who failed.

    Blocks. Opener n uses ``namespaces[n % len(namespaces)]``.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(OPENERS)]
        processes = [
            stack.enter_context(_process(url, namespaces[n % len(namespaces)], n, log))
            for n, log in enumerate(logs)
        ]
        stack.callback(_kill, processes)
        over = threading.Timer(PATIENCE, _kill, (processes,))
        over.daemon = True
        over.start()
        stack.callback(over.cancel)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has imported everything, and waits
        for process in processes:
            _let_go(process)
        return [
            f"process {n}: exit={process.returncode} {_end(log)}"
            for n, (process, log) in enumerate(zip(processes, logs, strict=True))
            if process.wait()
        ]


def _process(url: str, namespace: str, n: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    options = json.dumps({"run_id": run_id_of(n), "gate": True})
    return subprocess.Popen(
        [sys.executable, "-P", _SCRIPT, url, namespace, "opens", options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended early; its exit status says so


def _end(log: IO[bytes]) -> str:
    """The last line that it wrote on stderr: its error."""
    log.seek(0)
    lines = log.read()[-2000:].decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""

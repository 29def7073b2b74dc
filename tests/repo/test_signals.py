"""Children of the tests can be interrupted, however the tests were started."""

from __future__ import annotations

import subprocess
import sys

from tests.repo.clone import ROOT

PROGRAM = """
import signal, subprocess, sys
from tests.signals import children_take_signals
ignored = [n for n in (signal.SIGINT, signal.SIGQUIT) if signal.getsignal(n) is signal.SIG_IGN]
assert len(ignored) == 2, ignored
children_take_signals()
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(number)
    assert child.wait(60) == -number, (number, child.returncode)
    signal.raise_signal(number)
print("alive")
"""


def test_children_of_a_background_job_end_with_sigint() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'trap "" INT QUIT HUP; exec "$@"', "sh", sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "alive\n", done.stderr

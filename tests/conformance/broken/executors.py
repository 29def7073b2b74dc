"""Workers that are wrong on purpose, each in one way. The executor suite must catch every one.

``python -m tests.conformance.broken.executors KIND MODULE,MODULE [QUEUE,QUEUE]``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from pyworkflow.worker import create_runtime, import_modules, serve_here


def deaf(queues):
    """Acknowledges every doorbell, drops it, and does not sweep."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.sigwait({signal.SIGTERM})


def drains_by_killing(queues):
    """Calls it a drain when the process is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end():
        signal.sigwait({signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    serve_here(create_runtime(queues=queues))


def ignores_queues(queues):
    """Works on what it finds, wherever it belongs."""
    serve_here(create_runtime())


if __name__ == "__main__":
    import_modules(sys.argv[2].split(","))
    globals()[sys.argv[1]](sys.argv[3:] or None)

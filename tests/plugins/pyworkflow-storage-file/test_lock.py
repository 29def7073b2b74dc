"""The lock of a store: exclusion between objects and processes, fairness, the marker."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pyworkflow.spi import StorageError
from pyworkflow_storage_file._lock import CLEAN, Marker, StoreLock, boot_id

HOLD = """
import sys, time
from pathlib import Path
from pyworkflow_storage_file._lock import StoreLock
lock = StoreLock(Path(sys.argv[1])); lock.open(); lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path):
    made = StoreLock(tmp_path)
    made.open()
    yield made
    made.close()


def marker(**changes):
    values = {
        "state": CLEAN,
        "boot": boot_id(),
        "generation": 1,
        "segments": 2,
        "cuts": 3,
        "end": 2**40,
        "synced": 5,
        "pid": 4_000_000,
        "wall": 1,
        "boottime": 2,
    }
    return Marker(**(values | changes))


def test_the_marker_comes_back_as_it_was_left(lock):
    assert lock.read() is None
    left = marker()
    lock.write(left)
    assert lock.read() == left


def test_a_marker_with_any_byte_changed_is_none():
    data = marker().pack()
    for place in range(len(data)):
        bad = bytearray(data)
        bad[place] ^= 1
        assert Marker.unpack(bytes(bad)) is None
    assert Marker.unpack(data[:-1]) is None


def test_two_objects_in_one_process_exclude_each_other(lock, tmp_path):
    other = StoreLock(tmp_path)
    other.open()
    order = []
    lock.acquire()

    def second():
        other.acquire()
        order.append("second")
        other.release()

    thread = threading.Thread(target=second)
    thread.start()
    deadline = time.monotonic() + 10
    while other.waiting_since is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert other.waiting_since is not None
    order.append("first")
    lock.release()
    thread.join(10)
    assert order == ["first", "second"]
    other.close()


def test_who_comes_back_at_once_lets_the_one_that_waits_go_first(lock, tmp_path):
    other = StoreLock(tmp_path)
    other.open()
    turns = []
    stop = threading.Event()

    def spin(each, name):
        while not stop.is_set():
            each.acquire()
            turns.append(name)
            each.release()

    threads = [
        threading.Thread(target=spin, args=(lock, "a")),
        threading.Thread(target=spin, args=(other, "b")),
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while min(turns.count("a"), turns.count("b")) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert min(turns.count("a"), turns.count("b")) >= 50
    other.close()


def test_cra12_the_lock_of_a_killed_process_is_free(lock, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGKILL)
        lock.acquire()
        lock.release()


def test_a_lock_file_that_was_deleted_is_noticed(lock):
    lock.path.unlink()
    with pytest.raises(StorageError, match="deleted"):
        lock.acquire()

"""Log files that are renamed, deleted or cannot be opened while the process writes to them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyworkflow import _logging, configure_logging


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    _logging._reset_for_tests()
    logging.getLogger().setLevel(level)


@pytest.mark.parametrize("json_logs", [False, True])
def test_o02_a_renamed_log_file_is_followed_by_a_new_one(tmp_path: Path, json_logs: bool) -> None:
    log = tmp_path / "workflow.log"
    configure_logging(log_file=log, json_logs=json_logs)
    shop = logging.getLogger("shop")
    shop.warning("line one")
    for number in (1, 2):
        log.rename(tmp_path / f"workflow.log.{number}")
        shop.warning("line after %d", number)
    assert "line one" in (tmp_path / "workflow.log.1").read_text()
    assert "line after 1" in (tmp_path / "workflow.log.2").read_text()
    assert "line after 2" in log.read_text()
    assert "line after" not in (tmp_path / "workflow.log.1").read_text()


def test_o02_a_file_that_logrotate_made_already_is_taken(tmp_path: Path) -> None:
    log = tmp_path / "workflow.log"
    configure_logging(log_file=log)
    logging.getLogger("shop").warning("one")
    log.rename(tmp_path / "old")
    log.write_text("made by logrotate\n")  # `create`
    logging.getLogger("shop").warning("two")
    assert log.read_text().startswith("made by logrotate\n")
    assert "two" in log.read_text()


def test_o02_a_file_that_is_cut_or_deleted_is_followed(tmp_path: Path) -> None:
    log = tmp_path / "workflow.log"
    configure_logging(log_file=log)
    logging.getLogger("shop").warning("one")
    os.truncate(log, 0)  # `copytruncate`
    logging.getLogger("shop").warning("two")
    assert "two" in log.read_text()
    assert not log.read_text().startswith("\0")
    log.unlink()
    logging.getLogger("shop").warning("three")
    assert "three" in log.read_text()
    assert "two" not in log.read_text()


def test_o02_a_folder_that_is_gone_fails_no_code_that_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    configure_logging(log_file=folder / "workflow.log")
    folder.rename(tmp_path / "gone")
    logging.getLogger("shop").warning("lost from the file")
    said = capsys.readouterr().err
    assert "lost from the file" in said
    assert "FileNotFoundError" in said  # logging's own report
    for _ in range(100):
        logging.getLogger("shop").warning("lost as well")
    said = capsys.readouterr().err
    assert said.count("lost as well") == 100
    assert "FileNotFoundError" not in said  # that report comes once a minute
    folder.mkdir()
    logging.getLogger("shop").warning("in a new folder")
    assert "in a new folder" in (folder / "workflow.log").read_text()


_WRITES = """
import logging, sys
from pyworkflow import configure_logging
configure_logging(log_file=sys.argv[1])
for line in sys.stdin:
    logging.getLogger("shop").warning(line.strip())
    print("ok", flush=True)
"""


def test_o02_all_processes_that_write_into_one_file_follow_it(tmp_path: Path) -> None:
    log = tmp_path / "workflow.log"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITES, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]

    def say(text: str) -> None:
        for number, writer in enumerate(writers):
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write(f"{text} of {number}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "ok\n"

    try:
        say("before")
        log.rename(tmp_path / "old.log")
        say("after")
    finally:
        for writer in writers:
            writer.communicate(timeout=60)
    old, new = (tmp_path / "old.log").read_text(), log.read_text()
    for number in range(2):
        assert f"before of {number}" in old
        assert f"after of {number}" in new
    assert "after" not in old


def test_o02_threads_that_log_during_rotations_lose_no_line(tmp_path: Path) -> None:
    log = tmp_path / "workflow.log"
    configure_logging(log_file=log)

    def write(name: int) -> None:
        for number in range(200):
            logging.getLogger("shop").info("thread %d line %d.", name, number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    rotated = 0
    while any(thread.is_alive() for thread in threads):
        if log.exists():
            log.rename(tmp_path / f"old.{rotated}")
            rotated += 1
    for thread in threads:
        thread.join()
    files = [*tmp_path.glob("old.*"), *([log] if log.exists() else [])]
    text = "".join(file.read_text() for file in files)
    assert rotated
    assert all(f"thread {n} line {i}." in text for n in range(4) for i in range(200))

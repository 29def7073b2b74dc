"""Values on a terminal and in a text log: they add no lines, no escape sequences, no other order."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyworkflow._logging import _JsonFormatter, _TextFormatter
from pyworkflow._text import cut, escaped, escaped_json, indented
from pyworkflow.cli import _output as output

BAD = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))] + list(
    "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\ud800\udfff"
)
FORGED = "2026-01-01T00:00:00.000+00:00 INFO pyworkflow.engine: run completed: run_id=run_forged"


def clean(text: str) -> bool:
    return not any(char in text for char in BAD if char != "\n")


@pytest.mark.parametrize("char", BAD, ids=ascii)
def test_found_m05_control_characters_are_escaped(char: str) -> None:
    assert clean(escaped(f"a{char}b")), ascii(char)
    assert "\n" not in escaped(f"a{char}b")
    text = json.dumps({f"k{char}": char}, ensure_ascii=False)
    safe = escaped_json(text)
    assert clean(safe)
    assert json.loads(safe) == {f"k{char}": char}


def test_found_m05_other_text_stays() -> None:
    for text in ("Grüße, Zürich", "日本語", "👩‍👩‍👧", "שלום", "a\u00a0b", "\\n"):
        assert escaped(text) == text
    assert escaped("a\nb\t\x1b[2J\u202e") == "a\\nb\\t\\x1b[2J\\u202e"
    assert indented("a\nb\x1b") == "    a\n    b\\x1b"
    assert cut("x" * 50, 100) == "x" * 50
    short = cut("a" * 500 + "z" * 500, 100)
    assert (len(short), short[0], short[-1]) == (100, "a", "z")
    assert "1000 characters" in short


def _record(msg: str, *args: object, **fields: Any) -> logging.LogRecord:
    record = logging.LogRecord("my.logger", logging.INFO, "", 0, msg, args, None)
    vars(record).update(fields)
    return record


def _raised(message: str) -> Any:
    try:
        raise ValueError(message)
    except ValueError:
        return sys.exc_info()


@pytest.mark.parametrize("char", BAD, ids=ascii)
def test_found_m05_a_record_is_one_line_and_an_indented_traceback(char: str) -> None:
    value = f"x{char}{FORGED}\n{FORGED}"
    record = _record("order %s", value, run_id=value, step_name=value)
    record.exc_info = _raised(value)
    record.stack_info = value
    logging.Formatter().format(record)  # another handler's, which leaves its text in the record
    assert record.exc_text
    for told in (record, _record("x", exc_text=value)):
        first, *others = _TextFormatter(True).format(told).split("\n")
        assert clean(first)
        assert others
        assert all(line.startswith("    ") and clean(line) for line in others)
    line = _JsonFormatter(True).format(record)
    assert clean(line)
    assert "\n" not in line
    assert (
        json.loads(line)["message"] == f"order {value}".encode("utf-8", "backslashreplace").decode()
    )


def test_found_m05_long_records_are_cut_and_keep_their_context() -> None:
    record = _record("%s", "y" * 5_000_000, run_id="run_1", step_name="one")
    record.exc_info = _raised("z" * 5_000_000)
    text = _TextFormatter(True).format(record)
    assert len(text) < 100_000
    assert text.split("\n")[0].endswith("[run_id=run_1 step=one]")


def test_found_m05_a_table_stays_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(
        ("RUN", "STATUS"), [("a\nb\x1b[2J", "completed"), ("x" * 900, "failed"), ("c", "x")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 230
    assert clean("".join(lines))
    assert lines[1].split() == ["a\\nb\\x1b[2J", "completed"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_found_m05_a_terminal_gets_no_escape_sequence_of_a_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream in (_Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("TERM", "dumb")
        output.styled("a\x1b[2Jb\u202e", None)
        output.styled("a\x1b[2Jb\u202e", "green")
        output.print_table(("A",), [("\x1b[2J\n",)])
        output.print_pairs({"key": f"k\nrun  {FORGED}\x1b[2J", "error": ["one\x1b[2J", "two"]})
        output.print_json({"a": "\x1b[2J\x9b\u202e"})
        text = stream.getvalue()
        assert "\x1b[2J" not in text
        assert "\x9b" not in text
        assert "\u202e" not in text
        assert "k\\nrun" in text
        assert "\n       two" in text


APP = """
from pyworkflow import step, workflow, logger
EVIL = "x\\n2026-01-01T00:00:00.000+00:00 forged\\n\\x1b[2J\\u202e"
@step(max_retries=0)
async def call(text: str) -> str:
    raise ValueError(EVIL)
@workflow()
async def pay(order: str) -> str:
    logger.warning("order %s", order, extra={"field": EVIL})
    return await call(order)
if __name__ == "__main__":
    from pyworkflow import configure_logging, run
    configure_logging(level="INFO")
    try:
        run(pay.options(run_id="run\\nforged\\x1b[2J", idempotency_key=EVIL), EVIL, timeout=60)
    except ValueError:
        pass
"""


def test_found_m05_no_command_prints_what_a_value_wants_printed(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    env = os.environ | {"PYWORKFLOW_STORAGE": f"file:{tmp_path}/runs"}
    run_id = "run\nforged\x1b[2J"
    for args in (
        ["app.py"],
        ["-m", "pyworkflow.cli", "runs", "list"],
        ["-m", "pyworkflow.cli", "runs", "show", run_id],
        ["-m", "pyworkflow.cli", "runs", "events", run_id],
        ["-m", "pyworkflow.cli", "runs", "show", run_id, "--json"],
        ["-m", "pyworkflow.cli", "runs", "show", "no\nforged such\x1b[2J"],
        ["-m", "pyworkflow.cli", "run", "app.py:pay", "--arg", f"order={run_id}"],
    ):
        done = subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        text = done.stdout + done.stderr
        assert text, args
        assert clean(text), (args, text)
        forged = [line for line in text.split("\n") if line.startswith(("2026-01-01", "forged"))]
        assert not forged, (args, text)

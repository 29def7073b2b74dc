"""Arguments and results on the command line: readable with and without the modules of their types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyworkflow._serialization import encode
from pyworkflow.cli._values import arguments_line, plain_value, value_line

APP = """
from dataclasses import dataclass
from enum import Enum
from pydantic import BaseModel
from pyworkflow import configure, step, workflow

class Speed(Enum):
    FAST = 1

class OrderIn(BaseModel):
    order_id: str
    lines: list[int] = []

@dataclass
class Receipt:
    order: OrderIn
    speed: Speed

@step()
async def ship(order: OrderIn, speed: Speed = Speed.FAST) -> Receipt:
    return Receipt(order, speed)

@workflow()
async def fulfil_order(order: OrderIn) -> Receipt:
    return await ship(order)

if __name__ == "__main__":
    from pyworkflow import run
    run(fulfil_order, OrderIn(order_id="7c75", lines=[1]), timeout=60)
"""
ARGUMENT = {"order_id": "7c75", "lines": [1]}


def _cli(*args: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | {"PYWORKFLOW_STORAGE": f"file:{cwd}/runs", "COLUMNS": "400"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_n16_models_are_readable_without_their_module(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    _cli("app.py", cwd=tmp_path)

    def cli(*args: str) -> str:
        return _cli("-m", "pyworkflow.cli", *args, cwd=tmp_path)

    (run,) = json.loads(cli("runs", "list", "--json"))["runs"]
    assert run["args"] == {"0": ARGUMENT}
    assert run["result"] == {"order": ARGUMENT, "speed": "FAST"}
    run_id = run["run_id"]
    assert json.loads(cli("runs", "show", run_id, "--json"))["result"] == run["result"]
    order = "OrderIn(order_id='7c75', lines=[1])"
    shown = cli("runs", "show", run_id)
    assert f"arguments  {order}\n" in shown
    assert f"result     Receipt(order={order}, speed=Speed.FAST)\n" in shown
    told = cli("runs", "events", run_id)
    assert f"fulfil_order({order})" in told
    assert f"completed: Receipt(order={order}, speed=Speed.FAST)" in told
    assert "$py" not in shown + told
    events = [json.loads(line) for line in cli("runs", "events", run_id, "--json").splitlines()]
    assert json.loads(events[0]["data"]["args"])["args"][0]["$py"] == "model"
    text = cli("runs", "events", run_id, "--json", "--plain")
    plain = [json.loads(line) for line in text.splitlines()]
    assert plain[0]["data"]["args"] == {"0": ARGUMENT}
    assert plain[-1]["data"]["result"] == run["result"]
    # `run` knows the module, hence the name of the parameter.
    text = _cli(
        *("-m", "pyworkflow.cli", "run", "app.py:fulfil_order", "--arg"),
        *(f"order={json.dumps(ARGUMENT)}", "--json"),
        cwd=tmp_path,
    )
    last = json.loads(text.splitlines()[-1])
    assert (last["args"], last["result"]) == ({"order": ARGUMENT}, run["result"])


def _samples() -> list[Any]:
    from datetime import UTC, date, datetime, time, timedelta
    from decimal import Decimal
    from pathlib import PurePosixPath
    from uuid import UUID
    from zoneinfo import ZoneInfo

    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return [
        (at, at.isoformat()),
        (at.astimezone(ZoneInfo("Europe/Berlin")), "2026-01-02T04:04:05+01:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4), "03:04:00"),
        (timedelta(hours=1, milliseconds=500), 3600.5),
        (Decimal("1.50"), "1.50"),
        (UUID(int=5), str(UUID(int=5))),
        (b"ab", "YWI="),
        (2**3000, 2**3000),
        ((1, "a", (2,)), [1, "a", [2]]),
        ({3}, [3]),
        (frozenset({3}), [3]),
        (set(), []),
        (range(1, 5), [1, 5, 1]),
        ({1: "a"}, [[1, "a"]]),
        ({"$py": 1}, {"$py": 1}),
        (PurePosixPath("/x"), "/x"),
        (1 + 2j, [1.0, 2.0]),
        ({"a": [None, True, 1.5]}, {"a": [None, True, 1.5]}),
    ]


@pytest.mark.parametrize(("value", "plain"), _samples())
def test_n16_a_value_without_fields_is_shown_as_python_shows_it(value: Any, plain: Any) -> None:
    text = encode(value)
    assert value_line(text, 10_000) == repr(value)
    assert plain_value(text) == plain


def test_n16_what_cannot_be_shown_says_why() -> None:
    wrapped = '{"$py":"codec","c":[["zlib",{}]],"d":"AAAA"}'
    for text in (wrapped, "{", "x\x1b"):
        for shown in (value_line(text), plain_value(text), arguments_line(None, text)):
            assert shown.startswith("(")
            assert "\x1b" not in shown
    assert arguments_line(None, "[1]").startswith("(not arguments")
    assert value_line(None) == "None"
    unknown = '{"$py":"newer","v":[1]}'
    assert (value_line(unknown), plain_value(unknown)) == (repr(json.loads(unknown)), [1])
    generic = '{"$py":"model","t":"a.b:Box[builtins:int]","v":{"x":1},"x":{"y":[2]}}'
    assert value_line(generic) == "Box[int](x=1, y=[2])"
    assert plain_value(generic) == {"x": 1, "y": [2]}

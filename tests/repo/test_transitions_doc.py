"""The page about replay shows the table that replay uses, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.draw_transitions import BEGIN, PAGE, diagram, with_diagrams
from pyworkflow._replay.transitions import TABLE, OpKind


def test_the_diagrams_are_drawn_from_the_table() -> None:
    page = PAGE.read_text("utf-8")
    assert with_diagrams(page) == page, "run `python -m docs.draw_transitions`"


@pytest.mark.parametrize("kind", list(OpKind))
def test_every_row_is_in_the_diagram(kind: OpKind) -> None:
    arrows = [
        (*match.group("source", "to"), match["events"].split(", "), match["action"])
        for match in re.finditer(
            r"^  (?P<source>\w+) --> (?P<to>\w+): (?P<events>[\w., ]+) / (?P<action>\w+)$",
            diagram(kind),
            re.MULTILINE,
        )
    ]
    rows = {(s, event, to, act) for (k, s, event), (to, act) in TABLE.items() if k is kind}
    assert {(s, event, to, act) for s, to, events, act in arrows for event in events} == rows


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        with_diagrams(BEGIN)


def test_the_example_runs(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        (tmp_path / "example.py").write_text(example)
        subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True, timeout=60)

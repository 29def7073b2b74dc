"""The README's runner takes what is marked, in order, and fails when a block fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.repo.run_readme import blocks, run

PAGE = """
# Title

<!-- run -->
```bash
echo one
```

```bash
echo not marked
```

```python
x = 1
```

<!-- continues -->

```python
assert x == 1
```

<!-- not run: it needs a broker -->
```python
raise SystemExit(1)
```
"""


def test_blocks_carry_their_mark_and_what_they_continue() -> None:
    found = list(blocks(PAGE))
    assert [block.is_command for block in found] == [True, False, False, False, False]
    assert found[0].code == "echo one\n"
    assert found[3].code == "x = 1\n\nassert x == 1\n"
    assert found[4].mark == "not run: it needs a broker"
    assert PAGE.splitlines()[found[0].line - 1] == "echo one"


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("```python\nassert 1\n```\n", 0),
        ("```python\nassert 0\n```\n", 1),
        ("nothing to run\n", 1),
        ("```python\nassert 1\n```\n\n<!-- not run: why -->\n```python\nassert 0\n```\n", 0),
    ],
)
def test_the_status_tells_whether_every_block_passed(
    tmp_path: Path, page: str, status: int
) -> None:
    path = tmp_path / "PAGE.md"
    path.write_text(page)
    assert run(path) == status

"""Executes the README: every ```python block, and every ```bash block that is marked for running.

An HTML comment on the line above a block (blank lines between them do not matter) says how:

- ``<!-- run -->``            a bash block is executed, at the root of a fresh copy of the clone
- ``<!-- continues -->``      a python block is run after the python block before it, as one script
- ``<!-- not run: WHY -->``   a python block is only compiled

Python blocks run as scripts of their own, in an empty directory. Bash blocks share one copy, in the
order of the page, so that a later command finds what an earlier one installed.

Usage, at the root: python -m tests.repo.run_readme README.md
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.repo.clone import ROOT, files

TIMEOUT = 600.0
BLOCK = re.compile(
    r"(?:^[ ]*<!--[ ]*(?P<mark>[^\n]*?)[ ]*-->[ ]*\n\s*)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    language: str
    mark: str
    code: str
    line: int

    @property
    def is_command(self) -> bool:
        return self.language in {"bash", "sh", "console"} and self.mark == "run"


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page in order; a continued one carries the code it continues."""
    before = ""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        mark = match["mark"] or ""
        block = Block(language=match["language"], mark=mark, code=match["code"], line=line)
        if block.language == "python":
            if mark == "continues":
                block = replace(block, code=before + "\n" + block.code)
            before = block.code
        yield block


def copy_of_the_clone(target: Path) -> None:
    """The repository's files alone, so that nothing built here helps the commands there."""
    for path in files():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def environment() -> dict[str, str]:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TOX_", "PYWORKFLOW_")
    return {key: value for key, value in os.environ.items() if not key.startswith(hidden)}


def execute(arguments: list[str], cwd: Path) -> bool:
    begun = time.monotonic()
    try:
        status = subprocess.run(
            arguments, cwd=cwd, env=environment(), timeout=TIMEOUT, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"gave up after {TIMEOUT:.0f} s", flush=True)
        return False
    print(f"status={status} seconds={time.monotonic() - begun:.1f}", flush=True)
    return status == 0


def run(page: Path) -> int:
    found = list(blocks(page.read_text("utf-8")))
    executed, failed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        clone, scripts = Path(folder, "clone"), Path(folder, "scripts")
        if any(block.is_command for block in found):
            copy_of_the_clone(clone)
        for block in found:
            where = f"{page.name}:{block.line} ({block.language})"
            if block.is_command:
                print(f"--- {where}\n{block.code}", end="", flush=True)
                passed = execute(["bash", "-euo", "pipefail", "-c", block.code], clone)
            elif block.language == "python" and block.mark.startswith("not run:"):
                compile(block.code, where, "exec")
                continue
            elif block.language == "python":
                print(f"--- {where}", flush=True)
                script = scripts / str(block.line) / f"readme_{block.line}.py"
                script.parent.mkdir(parents=True)
                script.write_text(block.code, "utf-8")
                passed = execute([sys.executable, script.name], script.parent)
            else:
                continue
            executed += 1
            if not passed:
                failed.append(where)
    print(f"{page.name}: executed={executed} failed={len(failed)} {' '.join(failed)}")
    return 1 if failed or not executed else 0


if __name__ == "__main__":
    sys.exit(max(run(Path(argument)) for argument in sys.argv[1:]))

"""The guide to a backend for a server: what it quotes is there, and what it names exists."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pyworkflow.conformance
from pyworkflow import spi, storekit
from pyworkflow.storekit import remote
from tests.repo.clone import ROOT
from tests.repo.run_readme import blocks

GUIDE = ROOT / "docs" / "how-to" / "write-a-backend-for-a-server.md"
MODEL = ROOT / "tests" / "core" / "remote_store.py"


def test_d12_excerpts_are_what_the_model_has() -> None:
    quoted = [b for b in blocks(GUIDE.read_text("utf-8")) if b.mark.startswith("not run: from ")]
    assert len(quoted) >= 3
    for block in quoted:
        text = Path(ROOT, block.mark.removeprefix("not run: from ")).read_text("utf-8")
        code = block.code.replace("\n\n\n", "\n\n")  # as functions inside of a method have it
        indented = [textwrap.indent(code, " " * n) for n in (0, 4, 8)]
        assert any(body in text for body in indented), f"line {block.line} is not there"


def test_d12_the_names_of_the_kit_are_public() -> None:
    text = GUIDE.read_text("utf-8")
    table = text[text.index("## Everything else that writes items") :]
    table = table[: table.index("```")]
    named = set(re.findall(r"`(\w+)`", table))
    public = {*storekit.__all__, *remote.__all__}
    for name in ("claimable", "claimed", "renewed", "released", "notified", "freed", "tombstone"):
        assert name in named & public
    fields = {"rung_at", "due_at", "finished_at", "max_bytes", "before", "paused", "None"}
    unknown = named - public - fields - set(dir(spi.StorageBackend))
    assert not unknown


def test_d01_the_model_of_the_guide_imports_nothing_but_the_contract() -> None:
    allowed = {"pyworkflow.spi", "pyworkflow.storekit", "pyworkflow.storekit.remote"}
    for node in ast.walk(ast.parse(MODEL.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyworkflow"):
            assert node.module in allowed


def test_d03_the_protocol_of_the_server_is_exported() -> None:
    methods = ("kill", "start", "pause", "resume")
    assert all(callable(getattr(pyworkflow.conformance.Server, name)) for name in methods)

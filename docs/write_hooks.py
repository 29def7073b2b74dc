"""Write ``reference/hooks.md``, the page of hooks, from the hook specs themselves.

``python -m docs.write_hooks``; a test checks that the page is up to date.
"""

# ruff: noqa: INP001 - a script, run from the root of the repository

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path

from pyworkflow.spi import hookspecs

PAGE = Path(__file__).parent / "reference" / "hooks.md"
HEAD = """# Hooks

What a plugin may implement: plain functions or methods, marked with `pyworkflow.spi.hookimpl` and
named as here. A hook takes any of its arguments, by name. [How to observe runs](../how-to/observe-runs.md)
has an example; [codecs](../how-to/codecs.md), [backends](../how-to/write-a-backend.md) and
[executors](../how-to/write-an-executor.md) have pages of their own.

"""
SECTION = re.compile(r"^# --- (.+?) -+$", re.MULTILINE)


def page() -> str:
    """The page as it should be."""
    module = inspect.getdoc(hookspecs) or ""
    parts = [HEAD, _prose(module.partition("\n\n")[2])]
    source = inspect.getsource(hookspecs)
    heads = [(match.start(), match[1]) for match in SECTION.finditer(source)]
    heads.append((len(source), ""))
    for (start, title), (end, _) in itertools.pairwise(heads):
        names = re.findall(r"^def (pyworkflow_\w+)", source[start:end], re.MULTILINE)
        if names:
            parts.append(f"\n## {title[0].upper()}{title[1:]}\n")
            parts += [_entry(getattr(hookspecs, name)) for name in names]
    return "".join(parts)


def _entry(hook: Callable[..., object]) -> str:
    signature = inspect.signature(hook)
    arguments = ", ".join(f"{p.name}: {p.annotation}" for p in signature.parameters.values())
    returns = signature.return_annotation
    arrow = "" if returns == "None" else f" -> {returns}"
    text = _prose(inspect.getdoc(hook) or "")
    return f"\n### `{hook.__name__}`\n\n`({arguments}){arrow}`\n\n{text}"


def _prose(text: str) -> str:
    """A docstring as Markdown, a paragraph a line."""
    paragraphs = [" ".join(each.split()) for each in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs).replace("``", "`") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Write ``reference/spi.md``, what authors of plugins may import, from the docstrings.

``python -m docs.write_spi``; a test checks that the page is up to date.
"""

# ruff: noqa: INP001 - a script, run from the root of the repository

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).parent / "reference" / "spi.md"
HEAD = """# The contracts: `pyworkflow.spi` and `pyworkflow.storekit`

What authors of backends, executors and other plugins may import, besides `pyworkflow.errors`. The
guides are [write a backend](../how-to/write-a-backend.md),
[write a backend for a server](../how-to/write-a-backend-for-a-server.md) and
[write an executor](../how-to/write-an-executor.md). This page is made from the docstrings.
"""
MODULES = (
    "pyworkflow.spi",
    "pyworkflow.storekit",
    "pyworkflow.storekit.embedded",
    "pyworkflow.storekit.remote",
)
FIRST = "Names"
"""Heading of the names before the first comment of ``__all__``."""
SECTION = re.compile(r"^(Args|Raises|Returns|Yields):$")


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## `{name}`\n\n{prose(module.__doc__)}\n")
        for heading, names in groups(module):
            parts.append(f"### {heading}\n")
            parts += [entry(module, each) for each in names]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def groups(module: ModuleType) -> Iterator[tuple[str, list[str]]]:
    """The names of ``__all__`` under the comments that stand in it."""
    heading, names, inside = FIRST, list[str](), False
    source = Path(str(module.__file__)).read_text("utf-8")
    for token in tokenize.generate_tokens(iter(source.splitlines(True)).__next__):
        if token.type == tokenize.NAME and token.string == "__all__":
            inside = True
        elif inside and token.type == tokenize.COMMENT:
            if names:
                yield heading, names
            text = token.string.lstrip("# ")
            heading, names = text[0].upper() + text[1:], []
        elif inside and token.type == tokenize.STRING:
            names.append(ast.literal_eval(token.string))
        elif inside and token.string == "]":
            break
    yield heading, names


def entry(module: ModuleType, name: str) -> str:
    """What the page says of one name."""
    value: Any = getattr(module, name)
    if inspect.ismodule(value):
        return f"#### `{name}`\n\nModule. {prose(value.__doc__)}\n"
    if inspect.isclass(value):
        return of_class(name, value)
    if callable(value) and hasattr(value, "__code__"):
        return f"#### `{name}{signature(value)}`\n\n{prose(value.__doc__)}\n"
    if isinstance(value, (int, str)):
        return f"#### `{name} = {value!r}`\n"
    kind = "Type alias." if getattr(value, "__args__", None) else f"`{type(value).__name__}`."
    parts = " | ".join(f"`{each.__name__}`" for each in getattr(value, "__args__", ()))
    return f"#### `{name}`\n\n{kind} {parts}\n"


def of_class(name: str, kind: type[Any]) -> str:
    """A class: its fields, then its public methods."""
    lines = [f"#### `{name}`\n", prose(kind.__doc__), ""]
    node = tree_of(kind)
    if issubclass(kind, BaseException):
        return "\n".join(lines) + "\n"
    lines += [f"- {field}" for field in fields_of(node, is_enum=issubclass(kind, enum.Enum))]
    lines.append("")
    for method in node.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            lines += of_method(method)
    return "\n".join(lines) + "\n"


def of_method(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """One method of a class; nothing of a private one."""
    if node.name.startswith("_"):
        return []
    marks = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
    words = [
        word for word in ("abstractmethod", "final", "property", "classmethod") if word in marks
    ]
    shown = {"abstractmethod": "required"}
    kinds = "".join(f", {shown.get(word, word)}" for word in words)
    call = "" if "property" in marks else f"({arguments(node)})"
    awaited = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    text = textwrap.indent(prose(ast.get_docstring(node)), "  ").strip()
    return [f"- `{awaited}{node.name}{call}{result}`{kinds}: {text}"]


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The arguments as the source has them, without ``self``."""
    return re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))


def tree_of(kind: type[Any]) -> ast.ClassDef:
    """The class in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return tree


def fields_of(node: ast.ClassDef, *, is_enum: bool) -> Iterator[str]:
    """The attributes of a class, with the docstrings that follow them."""
    for place, line in enumerate(node.body):
        after = node.body[place + 1] if place + 1 < len(node.body) else None
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = (
                ": "
                + textwrap.indent(prose(inspect.cleandoc(str(after.value.value))), "  ").strip()
            )
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            shown = f"{line.target.id}: {ast.unparse(line.annotation)}"
            if line.value is not None:
                value = ast.unparse(line.value)
                shown += " = …" if value.startswith("field(") else f" = {value}"
        elif is_enum and isinstance(line, ast.Assign):
            shown = ast.unparse(line)
        else:
            continue
        if not shown.startswith("_"):
            yield f"`{shown}`{text}"


def signature(function: Any) -> str:
    """The arguments of a function as the source has them."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"({arguments(node)}){result}"


def prose(doc: str | None) -> str:
    """A docstring as Markdown."""
    lines: list[str] = []
    section = False
    for line in inspect.cleandoc(doc or "").replace("``", "`").splitlines():
        if SECTION.match(line):
            lines += ["", f"**{line.rstrip(':')}**", ""]
            section = True
        elif section and re.match(r"    \S", line):
            lines.append("- " + line.strip())
        elif section and line.strip():
            lines.append("  " + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

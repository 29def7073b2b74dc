"""Stored values for people and for ``--json``, without the modules that define their types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from pyworkflow._shapes import STATE
from pyworkflow._text import cut

__all__ = ["arguments_line", "plain_arguments", "plain_value", "value_line"]

Tree = Any
#: Tags of types with fields; the key ``t`` has the name of the type.
_FIELDS = frozenset(
    name + suffix
    for name in ("dataclass", "pydantic_dataclass", "namedtuple", "model", "model_json")
    for suffix in ("", STATE)
)
_MARK = "$py"


def arguments_line(workflow: str | None, text: str | None, limit: int = 200) -> str:
    """Stored arguments as a call shows them: ``order=OrderIn(order_id='7c75', …), 5``.

    ``workflow`` gives the names of parameters when this process defines it.
    """
    found = _call(workflow, text)
    if isinstance(found, str):
        return found
    return ", ".join(
        _limited(tree, limit) if name.isdecimal() else f"{name}={_limited(tree, limit)}"
        for name, tree in found.items()
    )


def plain_arguments(workflow: str | None, text: str | None) -> Any:
    """Stored arguments as an object of plain JSON values."""
    found = _call(workflow, text)
    return found if isinstance(found, str) else {name: _json(tree) for name, tree in found.items()}


def value_line(text: str | None, limit: int = 200) -> str:
    """A stored value as its ``repr`` would show it."""
    found, note = _tree(text)
    return note or _limited(found, limit)


def plain_value(text: str | None) -> Any:
    """A stored value as plain JSON: objects for types with fields, text for the other types."""
    found, note = _tree(text)
    return note or _json(found)


def _tree(text: str | None) -> tuple[Tree, str]:
    """The tree of a stored text, or why there is none."""
    from pyworkflow._codecs import describe
    from pyworkflow._restore import from_text
    from pyworkflow._serialization import is_wrapped
    from pyworkflow.errors import SerializationError

    if text is None:
        return None, ""
    if is_wrapped(text):
        return None, describe(text)
    try:
        return from_text(text), ""
    except SerializationError:
        return None, f"(not JSON: {cut(repr(text), 200)})"


def _call(workflow: str | None, text: str | None) -> dict[str, Tree] | str:
    from pyworkflow._declared import known_workflow

    tree, note = _tree(text)
    if note:
        return note
    try:
        args: list[Tree] = tree["args"]
        kwargs: dict[str, Tree] = tree.get("kwargs", {})
        defined = None if workflow is None else known_workflow(workflow)
        if defined is not None:
            try:
                return dict(defined.argument_names(tuple(args), kwargs))
            except TypeError:  # other parameters by now
                pass
        return {**{str(at): value for at, value in enumerate(args)}, **kwargs}
    except (KeyError, TypeError, AttributeError):
        return f"(not arguments: {cut(repr(text), 200)})"


# --- for people -----------------------------------------------------------------------------------


def _limited(tree: Tree, limit: int) -> str:
    text = _line(tree)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _line(tree: Tree) -> str:
    if isinstance(tree, list):
        return f"[{_items(tree)}]"  # pyright: ignore[reportUnknownArgumentType] # JSON
    if isinstance(tree, tuple):  # *args, by name
        return f"({_items(tree)})"  # pyright: ignore[reportUnknownArgumentType] # JSON
    if not isinstance(tree, dict):
        return repr(tree)
    node = cast("dict[str, Tree]", tree)
    tag = node.get(_MARK)
    if tag is None:
        return f"{{{', '.join(f'{name!r}: {_line(item)}' for name, item in node.items())}}}"
    if tag in _LINES:
        return _LINES[tag](node)
    if tag in _FIELDS:
        fields = (
            {**node["v"], **node.get("x", {})}
            if isinstance(node.get("v"), dict)
            else {"": node.get("v")}
        )
        return f"{_type(node)}({', '.join(f'{n}={_line(i)}' if n else _line(i) for n, i in fields.items())})"
    restored = _restored(node)
    return repr(node) if restored is node else repr(restored)


def _items(items: Any) -> str:
    return ", ".join(_line(item) for item in items)


def _type(node: Mapping[str, Tree]) -> str:
    plain, bracket, rest = str(node.get("t", "")).partition("[")
    name = plain.rpartition(":")[2].rpartition(".")[2]
    if not bracket:
        return name
    inner = ", ".join(part.rpartition(":")[2].rpartition(".")[2] for part in rest[:-1].split(","))
    return f"{name}[{inner}]"


def _tuple_line(node: Mapping[str, Tree]) -> str:
    inner = _items(node["v"])
    return f"({inner},)" if len(node["v"]) == 1 else f"({inner})"


def _pairs_line(node: Mapping[str, Tree]) -> str:
    return f"{{{', '.join(f'{_line(key)}: {_line(item)}' for key, item in node['v'])}}}"


_LINES: Mapping[str, Callable[[Mapping[str, Tree]], str]] = {
    "dict": _pairs_line,
    "tuple": _tuple_line,
    "set": lambda node: f"{{{_items(node['v'])}}}" if node["v"] else "set()",
    "frozenset": lambda node: f"frozenset({{{_items(node['v'])}}})" if node["v"] else "frozenset()",
    "enum": lambda node: f"{_type(node)}.{node['v']}",
    "flag": lambda node: f"{_type(node)}({_line(node['v'])})",
    "typed": lambda node: _line(node["v"]),
}


def _restored(node: dict[str, Tree]) -> object:
    """The value of a tag that names no type; the node itself when it cannot be made."""
    from pyworkflow._restore import restore
    from pyworkflow.errors import SerializationError

    if "t" in node:
        return node
    try:
        return restore(dict(node))
    except SerializationError:
        return node


# --- for programs ---------------------------------------------------------------------------------


def _json(tree: Tree) -> Any:
    if isinstance(tree, list | tuple):
        return [_json(item) for item in cast("list[Tree]", tree)]
    if not isinstance(tree, dict):
        return tree
    node = cast("dict[str, Tree]", tree)
    tag = node.get(_MARK)
    if tag is None:
        return {name: _json(item) for name, item in node.items()}
    if tag == "dict":
        pairs = [(_json(key), _json(item)) for key, item in node["v"]]
        named = {key: item for key, item in pairs if isinstance(key, str)}
        return named if len(named) == len(pairs) else [list(pair) for pair in pairs]
    if tag == "int":
        return int(node["v"], 16)
    if tag == "timedelta":
        return cast("Any", _restored(node)).total_seconds()
    if tag in ("datetime", "time") and hasattr(moment := _restored(node), "isoformat"):
        return cast("Any", moment).isoformat()
    if "v" not in node:
        return node
    inner = _json(node["v"])
    return {**inner, **_json(node["x"])} if tag in _FIELDS and "x" in node else inner

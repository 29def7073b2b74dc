"""Names of types in a history, and the way back: ``module:qualname``.

Reading a history must not run code that nobody chose: a name is looked up among what is imported
already, and imported only from the standard library and from packages that were registered.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from pyworkflow.errors import SerializationError

__all__ = ["is_portable", "main_name", "portable_name", "register_portable", "resolve_type"]

_registered = {"pyworkflow"}
_MAIN = ("__main__", "__mp_main__")
#: Modules of the standard library that do something when imported.
_NEVER = frozenset({"antigravity", "idlelib", "lib2to3", "test", "this", "turtledemo"})
#: Parts of a module's name, below its package, that promise the same.
_DOES_SOMETHING = frozenset({"__main__", "test"})


def register_portable(module_name: str) -> None:
    """Let types of this module's top-level package come back as themselves on every worker.

    Called for each module that defines workflows or steps, so that all workers agree.
    """
    name = main_name() if module_name in _MAIN else module_name
    _registered.add(name.partition(".")[0])


def is_portable(module_name: str) -> bool:
    """Whether every worker can import this module: built in, standard library, or registered."""
    root, *rest = module_name.split(".")
    if any(part in _DOES_SOMETHING for part in rest):
        return False
    if root in _MAIN:
        root = main_name().partition(".")[0]
    return root in _registered or (root in sys.stdlib_module_names and root not in _NEVER)


def main_name() -> str:
    """The name under which other processes import what is ``__main__`` here."""
    main = sys.modules.get("__main__")
    spec: ModuleSpec | None = getattr(main, "__spec__", None)
    return _main_name(spec.name if spec else None, getattr(main, "__file__", None))


@lru_cache(maxsize=4)
def _main_name(spec: str | None, file: str | None) -> str:
    if spec and spec != "__main__":
        return spec
    return Path(file).stem if file else "__main__"


def _is_main(module_name: str) -> bool:
    """Whether this is what others call the script: its path ends like the module's name."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is not None and _ends_like(file, module_name)


@lru_cache(maxsize=256)
def _ends_like(file: str, module_name: str) -> bool:
    path, parts = Path(file).resolve(), tuple(module_name.split("."))
    stem = path.parent if path.name == "__main__.py" else path.with_suffix("")
    if parts[-1] == "__main__":
        parts = parts[:-1]
    return bool(parts) and stem.parts[-len(parts) :] == parts


def portable_name(cls: type) -> str:
    """``module:qualname``; ``__main__`` is called by its file's module name.

    A parametrized generic model is ``module:qualname[argument,...]``.
    """
    generic = getattr(cls, "__pydantic_generic_metadata__", None)
    if generic and generic["origin"] is not None:
        arguments = ",".join(
            portable_name(item) if isinstance(item, type) else f"?{item!r}"
            for item in generic["args"]
        )
        return f"{portable_name(generic['origin'])}[{arguments}]"
    module = main_name() if cls.__module__ in _MAIN else cls.__module__
    return f"{module}:{cls.__qualname__}"


def resolve_type(name: str) -> type:
    """The class that ``portable_name`` calls so. Nothing is called but generic subscription.

    Raises:
        SerializationError: there is no such class, or its module may not be imported.
    """
    plain, bracket, rest = name.partition("[")
    module_name, colon, qualname = plain.partition(":")
    if not colon or (bracket and not rest.endswith("]")):
        raise SerializationError(f"not the name of a type: name={name!r}")
    found = _lookup(name, module_name, qualname)
    if not bracket:
        return found
    if not hasattr(found, "__pydantic_generic_metadata__"):
        raise SerializationError(f"not a generic pydantic model: name={plain!r}")
    arguments = tuple(resolve_type(part) for part in _split(rest[:-1]))
    try:
        made: object = found[arguments]  # type: ignore[index] # a generic model, checked above
    except TypeError as wrong:
        raise SerializationError(f"the type has changed: name={name!r}: {wrong}") from wrong
    assert isinstance(made, type)
    return made


def _lookup(name: str, module_name: str, qualname: str) -> type:
    if "<locals>" in qualname:
        raise SerializationError(
            f"the history names a type of a function's body: type={name!r}; define the class at "
            "the top level of its module"
        )
    for module in _modules(name, module_name):
        found: object = module
        for part in qualname.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type):
            return found
    raise SerializationError(
        f"the history names a type that is not in this code: type={name!r}; put the class back "
        f"where it was, or keep an alias {qualname!r} in module {module_name!r}"
    )


def _modules(name: str, module_name: str) -> Iterator[object]:
    is_main = "__main__" in sys.modules and (module_name == main_name() or _is_main(module_name))
    if is_main:
        # The file that runs as a script: its classes, not those of a second import of it.
        yield sys.modules["__main__"]
    module = sys.modules.get(module_name)
    # A second import of the script would do all that it does once more.
    if module is None and not is_main and is_portable(module_name) and module_name not in _MAIN:
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as failed:  # an import runs any code
            raise SerializationError(
                f"the module of a stored type cannot be imported: type={name!r}: "
                f"{type(failed).__name__}: {failed}; repair or install it on this worker"
            ) from failed
    if module is not None:
        yield module
    elif not is_main:
        raise SerializationError(
            f"the history names a type whose module is not imported here: type={name!r}; import "
            "it in the module that defines the workflow"
        )


def _split(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth, start = list[str](), 0, 0
    for position, char in enumerate(text):
        if char == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
        depth += (char == "[") - (char == "]")
    return [*parts, text[start:]]

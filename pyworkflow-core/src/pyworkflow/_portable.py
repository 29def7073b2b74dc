"""Names of types in a history, and the way back: ``module:qualname``.

A name from a store imports nothing: it is looked up among the modules that this process has
imported. Which types of errors are recorded as themselves is decided where they are raised, by the
modules that were there when the worker started.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from pyworkflow.errors import ConfigurationError, SerializationError

__all__ = [
    "import_listed",
    "is_defining",
    "is_portable",
    "main_name",
    "note_imports",
    "portable_name",
    "register_portable",
    "resolve_type",
]

_registered = {"pyworkflow"}
"""The core, and the modules that define workflows or steps."""
_MAIN = ("__main__", "__mp_main__")


class _Process:
    """The modules of this process whose types are portable besides the registered ones."""

    def __init__(self) -> None:
        self.listed: tuple[str, ...] = ()
        """Those of the setting ``portable_modules``."""
        self.imported: frozenset[str] | None = None
        """Imported when the workflow modules were; None before the first worker."""
        self.grew = True
        """Workflows were defined since ``imported`` was taken."""


_process = _Process()


def register_portable(module_name: str, *, in_step: bool = False) -> None:
    """Make types of this module portable; called for each module with workflows or steps.

    Definitions that come after the worker's start bring the modules with them that are imported by
    then, but not when a step imports them (``in_step``).
    """
    name = main_name() if module_name in _MAIN else module_name
    _registered.add(name)
    if not in_step:
        _process.grew = True
        if _process.imported is not None:
            _process.imported |= frozenset(list(sys.modules))


def note_imports() -> None:
    """Make types of all modules that are imported now portable.

    A worker calls it when it starts, after its workflow modules were imported: what a step imports
    later stays out.
    """
    if _process.imported is None or _process.grew:
        # A list first: another thread may be importing.
        _process.imported = (_process.imported or frozenset()) | frozenset(list(sys.modules))
        _process.grew = False


def import_listed(names: Iterable[str], *, required: bool = True) -> None:
    """Import the modules of the setting ``portable_modules``, and make their types portable.

    Raises:
        ConfigurationError: one cannot be imported, and they are ``required``.
    """
    listed = tuple(names)
    for name in listed:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as failed:  # an import runs any code
            if not required:
                continue
            raise ConfigurationError(
                f"a module of the setting portable_modules cannot be imported: module={name}: "
                f"{type(failed).__name__}: {failed}; install it, or remove it from the setting"
            ) from failed
    _process.listed = tuple(dict.fromkeys((*_process.listed, *listed)))


def is_portable(module_name: str) -> bool:
    """Whether errors of this module's types are recorded as themselves.

    The builtins, the standard library, the core, modules with workflows or steps, those of the
    setting, and those that were imported when the worker started.
    """
    if module_name in _MAIN:
        return main_name() in _registered
    if module_name in _registered:
        return True
    root = module_name.partition(".")[0]
    if root == "pyworkflow" or root in sys.stdlib_module_names:
        return True
    if any(module_name == name or module_name.startswith(f"{name}.") for name in _process.listed):
        return True
    if _process.imported is None:
        note_imports()
    assert _process.imported is not None
    return module_name in _process.imported


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


def is_defining(module_name: str) -> bool:
    """Whether workflows or steps are defined in the module, or in another of its package."""
    root = (main_name() if module_name in _MAIN else module_name).partition(".")[0]
    return any(name.partition(".")[0] == root for name in _registered)


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
        SerializationError: there is no such class, or its module is not imported.
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
    if module is not None:
        yield module
    elif not is_main:
        raise SerializationError(
            f"the history names a type whose module is not imported here: type={name!r}; import it "
            f"in the module that defines the workflow, or add {module_name!r} to the setting "
            "portable_modules"
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

"""Finds plugins and makes backends and executors from URLs.

Plugins are entry points of the group ``pyworkflow``, named by the URL scheme that they serve. A
lookup by URL loads that one; workers and the command line load all. One that does not load never
stops the others. Calling their hooks is in ``_hooks.py``, whose names are offered here too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pyworkflow import _hooks
from pyworkflow._config import Settings, check_namespace, settings
from pyworkflow._hooks import around, ask, error_class, hooks_active, observe, observer_errors
from pyworkflow._urls import ParsedUrl, check_name, parse_url, redact_url, resolve_url
from pyworkflow.errors import (
    ArgumentError,
    ConfigurationError,
    PluginBroken,
    PluginNotFound,
    WorkflowError,
)

if TYPE_CHECKING:
    from pluggy import HookImpl

    from pyworkflow.spi import Codec, Executor, StorageBackend

__all__ = [
    "PluginInfo",
    "around",
    "ask",
    "error_class",
    "hooks_active",
    "is_registered",
    "list_plugins",
    "load_all",
    "load_observers",
    "make_codec",
    "make_executor",
    "make_storage",
    "observe",
    "observer_errors",
    "parse_url",
    "redact_url",
    "register",
    "register_plugin",
    "tell_settings",
    "unregister",
    "unregister_plugin",
]

GROUP = "pyworkflow"
CORE = "pyworkflow-core"
#: Served by the core, also when it runs from a source tree without installed entry points.
_BUILTIN = {
    "aesgcm": "pyworkflow._codec_plugin",
    "local": "pyworkflow._local_plugin",
    "memory": "pyworkflow._memory_plugin",
    "offload": "pyworkflow._codec_plugin",
    "zlib": "pyworkflow._codec_plugin",
    "zstd": "pyworkflow._codec_plugin",
}
_WELL_KNOWN = {
    "celery": "pyworkflow-celery",
    "file": "pyworkflow-storage-file",
    "postgres": "pyworkflow-storage-sql[postgres]",
    "postgresql": "pyworkflow-storage-sql[postgres]",
    "redis": "pyworkflow-storage-redis",
    "rediss": "pyworkflow-storage-redis",
    "sqlite": "pyworkflow-storage-sql[sqlite]",
}
#: Distributions of this project whose plugins serve URLs and observe nothing.
_SERVE_URLS = frozenset({CORE, *(name.partition("[")[0] for name in _WELL_KNOWN.values())})
_SECRET_SETTINGS = ("storage", "executor", "broker_url")
"""They may carry credentials."""
_KINDS = {
    "pyworkflow_make_codec": "codec",
    "pyworkflow_make_executor": "executor",
    "pyworkflow_make_storage": "storage",
}
_MARK_HOOKS = (
    "mark its methods or functions with @hookimpl of pyworkflow.spi, named as in "
    "pyworkflow.spi.hookspecs"
)
_log = logging.getLogger("pyworkflow.plugins")

Status = Literal["loaded", "broken", "disabled", "conflict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One plugin, as ``pyworkflow plugins`` shows it."""

    name: str
    """The entry point's name: a URL scheme, or the distribution's name."""
    distribution: str
    """Empty for an object that the application registered."""
    version: str
    """Empty when unknown."""
    kinds: tuple[str, ...]
    """Of ``storage``, ``executor``, ``codec``, ``hooks``; empty when it is not loaded."""
    status: Status
    error: str | None = None


def make_storage(url: str, namespace: str = "default") -> StorageBackend:
    """Make the backend for a storage URL. Does no I/O; every call makes a new object.

    A relative path is relative to the current directory of this call.

    Raises:
        PluginNotFound: No installed plugin serves the scheme; names the ``pip install`` line.
        PluginBroken: Its plugin does not load.
        ConfigurationError: The URL or an option is wrong, the plugin is disabled, or two
            distributions serve the scheme, or the plugin is written for another version of the
            contract.
    """
    from pyworkflow.spi._contract import check_storage_contract
    from pyworkflow.spi.storage import StorageBackend

    parse_url(url, "storage")
    check_name(url)
    parsed = parse_url(resolve_url(url, Path()), "storage")
    if "namespace" in parsed.options:
        raise ConfigurationError(
            f"the namespace is no part of the storage URL: storage={redact_url(url)!r}; "
            "give it with the setting namespace"
        )
    options = {**parsed.options, "namespace": check_namespace(namespace)}
    made = _catalogue.make("storage", parsed, options)
    if not isinstance(made, StorageBackend):
        raise _not_a("storage", parsed, made, "a subclass of pyworkflow.spi.StorageBackend")
    check_storage_contract(made)
    return made


def make_executor(url: str, config: Mapping[str, str] | None = None) -> Executor:
    """Make the executor for an executor URL. Does no I/O.

    The plugin's options are ``config`` overridden by the URL's query. Raises as ``make_storage``.
    """
    from pyworkflow.spi._contract import check_executor_contract

    parsed = parse_url(url, "executor")
    check_name(url, "executor")
    made = _catalogue.make("executor", parsed, {**(config or {}), **parsed.options})
    if not all(
        callable(getattr(made, name, None)) for name in ("open", "notify", "serve", "close")
    ):
        raise _not_a("executor", parsed, made, "a pyworkflow.spi.Executor")
    executor = cast("Executor", made)
    check_executor_contract(executor)
    return executor


def make_codec(name: str, options: Mapping[str, str]) -> Codec:
    """Make the codec of this name.

    Raises:
        ConfigurationError: No plugin makes it, its plugin does not load, a
            library or a key is missing.
    """
    made = _catalogue.make_codec(name, options)
    if not all(callable(getattr(made, method, None)) for method in ("encode", "decode")):
        raise ConfigurationError(
            f"the plugin made something else than a pyworkflow.spi.Codec: codec={name} "
            f"type={type(made).__name__}; report it to the plugin's author"
        )
    return cast("Codec", made)


def load_all() -> list[PluginInfo]:
    """Load every plugin that is installed and not disabled; says what became of each.

    Never raises for a plugin that does not load: it is logged once and listed as broken.
    """
    return _catalogue.load_all()


def list_plugins() -> list[PluginInfo]:
    """All plugins by name, after loading them: kinds and errors are known only then."""
    return load_all()


def load_observers() -> None:
    """Load the installed plugins that may observe, and tell them the settings; once.

    For every runtime, the embedded worker and clients as well: plugins that serve this project's
    own URLs are left out, since they load when a URL asks for them.
    """
    _catalogue.load_observers()
    tell_settings(settings())


def tell_settings(config: Settings) -> None:
    """Tell plugins the settings that carry no credentials: each plugin once."""
    if not hooks_active("pyworkflow_configure"):
        return
    shown = {
        field.name: str(getattr(config, field.name))
        for field in fields(config)
        if field.name not in _SECRET_SETTINGS
    }
    _hooks.observe_once("pyworkflow_configure", config=shown)


def register_plugin(plugin: object, name: str | None = None) -> None:
    """Add an object or a module that has hooks; a second time is a no-op.

    Its hooks are the methods or functions that ``pyworkflow.spi.hookimpl`` marks, named as in
    ``pyworkflow.spi.hookspecs``. They are called from now on, whatever works in this process. Its
    factories are asked before those of installed plugins. A plugin without hooks logs a warning.

    Args:
        plugin: The object.
        name: How messages and ``list_plugins`` call it; by default the module's name, or the
            type's.

    Raises:
        ArgumentError: None, text, a number or a class.
        ConfigurationError: a hook of the wrong form, or the name is taken.
    """
    _catalogue.add(plugin, name)


def unregister_plugin(plugin: object) -> None:
    """Remove what ``register_plugin`` added; a no-op when it is not there."""
    _catalogue.remove(plugin)


def is_registered(plugin: object) -> bool:
    """Whether ``register_plugin`` added it."""
    return _catalogue.is_added(plugin)


register = register_plugin
unregister = unregister_plugin


@dataclass(frozen=True, slots=True)
class _Found:
    """An entry point, not loaded yet."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]

    @property
    def disabled(self) -> bool:
        names = {_normal(name) for name in settings().disable_plugins}
        return bool(names & {_normal(self.name), _normal(self.distribution)})

    def info(
        self, status: Status, error: str | None = None, kinds: tuple[str, ...] = ()
    ) -> PluginInfo:
        return PluginInfo(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            kinds=kinds,
            status=status,
            error=error,
        )


class _Catalogue:
    """What is installed, what of it is loaded, and what the application registered."""

    def __init__(self) -> None:
        # Held while plugins are imported. Registering does not take it, since modules may do so
        # while another thread waits here for their import.
        self._loading = threading.RLock()
        self._found: dict[str, list[_Found]] | None = None
        self._loaded: dict[str, object] = {}
        self._broken: dict[str, str] = {}
        self._application: dict[str, object] = {}
        self._has_observers = False

    def make(self, kind: str, url: ParsedUrl, options: Mapping[str, str]) -> object:
        """The first answer of the application's plugins, then of the scheme's own plugin."""
        hook = f"pyworkflow_make_{kind}"
        own = [*self._application.values()]
        for impl in _hooks.table().impls(hook):
            if any(impl.plugin is plugin for plugin in own):
                made = _make_with(impl, "the application", kind, url, options)
                if made is not None:
                    return made
        found = self._one(kind, url.scheme)
        plugin = self._load(found)
        for impl in _hooks.table().impls(hook):
            if impl.plugin is plugin:
                made = _make_with(impl, found.distribution, kind, url, options)
                if made is not None:
                    return made
        raise PluginNotFound(kind, url.scheme)

    def make_codec(self, name: str, options: Mapping[str, str]) -> object:
        """As ``make``, for a codec."""
        hook, own = "pyworkflow_make_codec", [*self._application.values()]
        asked = {"name": name, "options": dict(options)}
        for impl in _hooks.table().impls(hook):
            if any(impl.plugin is plugin for plugin in own):
                made = _codec_with(impl, name, asked)
                if made is not None:
                    return made
        if name in self._entry_points():
            plugin = self._load(self._one("codec", name))
            for impl in _hooks.table().impls(hook):
                if impl.plugin is plugin:
                    made = _codec_with(impl, name, asked)
                    if made is not None:
                        return made
        raise ConfigurationError(
            f"no installed plugin makes this codec: codec={name}; install the plugin, "
            "`pyworkflow plugins` lists what is installed"
        )

    def load_all(self) -> list[PluginInfo]:
        infos: list[PluginInfo] = []
        for name, found in sorted(self._entry_points().items()):
            enabled = [one for one in found if not one.disabled]
            infos += [one.info("disabled") for one in found if one not in enabled]
            if len(enabled) > 1:
                infos += [one.info("conflict", _conflict(name, enabled)) for one in enabled]
                continue
            for one in enabled:
                try:
                    infos.append(one.info("loaded", kinds=_kinds(self._load(one))))
                except PluginBroken as broken:
                    infos.append(one.info("broken", broken.cause))
        return infos + [
            PluginInfo(
                name=name, distribution="", version="", kinds=_kinds(plugin), status="loaded"
            )
            for name, plugin in [*self._application.items()]
        ]

    def load_observers(self) -> None:
        if self._has_observers:
            return
        with self._loading:
            for _, found in sorted(self._entry_points().items()):
                enabled = [one for one in found if not one.disabled]
                if len(enabled) != 1 or _normal(enabled[0].distribution) in _SERVE_URLS:
                    continue
                try:
                    self._load(enabled[0])
                except PluginBroken:
                    continue  # it was logged, and `pyworkflow plugins` lists it
            self._has_observers = True

    def is_added(self, plugin: object) -> bool:
        return any(plugin is existing for existing in [*self._application.values()])

    def add(self, plugin: object, name: str | None) -> None:
        if self.is_added(plugin):
            return
        if isinstance(plugin, type):
            raise ArgumentError(
                f"a plugin is an object, not a class: plugin={plugin.__qualname__}; write "
                f"register_plugin({plugin.__name__}())"
            )
        if plugin is None or isinstance(plugin, str | bytes | int | float):
            raise ArgumentError(
                f"a plugin is an object or a module with hooks, not plugin={plugin!r:.80}; "
                f"{_MARK_HOOKS}"
            )
        named = name or getattr(plugin, "__name__", "")
        named = named or f"{type(plugin).__qualname__}-{id(plugin):x}"
        try:
            _hooks.table().register(plugin, named)
        except Exception as error:
            raise ConfigurationError(
                f"the plugin cannot be registered: plugin={named}: {_reason(error)}; "
                "its hooks must have the form of pyworkflow.spi.hookspecs"
            ) from error
        self._application[named] = plugin
        if not _hooks.has_hooks(plugin):
            _log.warning("the plugin has no hooks: plugin=%s; %s", named, _MARK_HOOKS)

    def remove(self, plugin: object) -> None:
        for name, standing in [*self._application.items()]:
            if standing is plugin:
                del self._application[name]
                _hooks.table().unregister(plugin)

    def _one(self, kind: str, scheme: str) -> _Found:
        found = self._entry_points().get(scheme, [])
        enabled = [one for one in found if not one.disabled]
        if found and not enabled:
            raise ConfigurationError(
                f"the plugin is disabled: plugin={scheme} distribution={found[0].distribution}; "
                "remove it from PYWORKFLOW_DISABLE_PLUGINS (setting disable_plugins)"
            )
        if not enabled:
            raise PluginNotFound(kind, scheme, _WELL_KNOWN.get(scheme))
        if len(enabled) > 1:
            raise ConfigurationError(_conflict(scheme, enabled))
        return enabled[0]

    def _entry_points(self) -> dict[str, list[_Found]]:
        with self._loading:
            if self._found is None:
                self._found = _discover()
            return self._found

    def _load(self, found: _Found) -> object:
        with self._loading:
            if found.name in self._loaded:
                return self._loaded[found.name]
            if found.name in self._broken:
                raise PluginBroken(found.name, found.distribution, self._broken[found.name])
            try:
                plugin = found.load()
                # One module may serve several schemes: the table takes it once.
                _hooks.table().register(plugin, found.name)
            except (Exception, SystemExit) as error:
                broken = PluginBroken(found.name, found.distribution, _reason(error))
                self._broken[found.name] = broken.cause
                _log.warning("%s", broken)
                raise broken from error
            self._loaded[found.name] = plugin
            return plugin


_catalogue = _Catalogue()


def _reset_for_tests() -> None:  # pyright: ignore[reportUnusedFunction] - by tests
    global _catalogue
    _hooks._reset_for_tests()
    _catalogue = _Catalogue()


def _discover() -> dict[str, list[_Found]]:
    from importlib import import_module, metadata

    try:
        core_version = metadata.version(CORE)
    except metadata.PackageNotFoundError:
        core_version = ""

    def builtin(scheme: str, module: str) -> _Found:
        return _Found(scheme, CORE, core_version, lambda: import_module(module))

    found = {scheme: [builtin(scheme, module)] for scheme, module in _BUILTIN.items()}
    for point in metadata.entry_points(group=GROUP):
        distribution = point.dist
        name = distribution.name if distribution is not None else "an unknown distribution"
        version = distribution.version if distribution is not None else ""
        if _normal(name) != CORE or point.name not in _BUILTIN:
            one = _Found(point.name, name, version, point.load)
            found.setdefault(point.name.lower(), []).append(one)
    return found


def _make_with(
    impl: HookImpl, distribution: str, kind: str, url: ParsedUrl, options: Mapping[str, str]
) -> object:
    try:
        return _hooks.call(impl, {"url": url.url, "options": dict(options)})
    except ConfigurationError as error:
        said, shown = str(error), redact_url(url.url)
        if shown == url.url or url.url not in said:
            raise
        # A plugin's message may repeat the URL as it got it.
        raise ConfigurationError(said.replace(url.url, shown)) from None
    except WorkflowError:
        raise
    except ImportError as error:  # a driver that is an extra of the plugin
        raise PluginBroken(url.scheme, distribution, _reason(error)) from error
    except Exception as error:
        shown = redact_url(url.url)
        reason = _reason(error).replace(url.url, shown)
        raise ConfigurationError(
            f"the plugin {url.scheme!r} of {distribution} cannot use the {kind} URL: "
            f"{kind}={shown!r}: {reason}; check the URL and its options"
        ) from error


def _codec_with(impl: HookImpl, name: str, asked: Mapping[str, object]) -> object:
    try:
        return _hooks.call(impl, asked)
    except WorkflowError:
        raise
    except Exception as error:  # noqa: BLE001 - a plugin's own bug; who asked for the codec is told
        # Its message may repeat an option, and so a key: only its type is told.
        raise ConfigurationError(
            f"the codec cannot be made: codec={name} plugin={impl.plugin_name} "
            f"error={type(error).__name__}; check its options and what it needs"
        ) from None


def _kinds(plugin: object) -> tuple[str, ...]:
    return tuple(sorted({_KINDS.get(hook, "hooks") for hook in _hooks.table().hooks_of(plugin)}))


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _conflict(scheme: str, found: Iterable[_Found]) -> str:
    names = " and ".join(sorted(f"{one.distribution} {one.version}".strip() for one in found))
    return (
        f"two distributions serve one URL scheme: scheme={scheme} distributions={names}; "
        "uninstall one, or name one distribution in PYWORKFLOW_DISABLE_PLUGINS"
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _not_a(kind: str, url: ParsedUrl, made: object, wanted: str) -> ConfigurationError:
    return ConfigurationError(
        f"the plugin made something else than {wanted}: {kind}={redact_url(url.url)!r} "
        f"type={type(made).__name__}; report it to the plugin's author"
    )

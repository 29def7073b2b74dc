"""``run_conformance``: the suite on a store, without a test module; gives a ``Report``."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, cast
from uuid import uuid4

import pytest

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi.capabilities import StorageInfo
from pyworkflow.spi.storage import StorageBackend
from pyworkflow_conformance._at_once import TEST, by_processes
from pyworkflow_conformance._levels import LEVELS, PROOFS, Check, Level, checks
from pyworkflow_conformance._report import Report, Result, Status, highest, judge
from pyworkflow_conformance._told import without_headline

if TYPE_CHECKING:
    from pyworkflow_conformance._target import Factory
    from pyworkflow_conformance.storage import StorageConformance

__all__ = [
    "PREFIX",
    "Seen",
    "check_prefix",
    "current_suite",
    "look",
    "run_conformance",
    "wants_at_once",
]

PREFIX = "conformance-"
_ENTRY = "pyworkflow_conformance._entry"
_running: list[Callable[[], type[StorageConformance]]] = []


def run_conformance(
    target: str | Factory,
    *,
    profile: Level = "full",
    seed: int = 0,
    only: Iterable[str] = (),
    keyword: str = "",
    prefix: str = PREFIX,
    progress: Callable[[Result], None] | None = None,
    seen: Seen | None = None,
) -> Report:
    """Run the suite on a store and say what it reaches.

    Existing data is left alone: every check works in a namespace of its own, whose name begins
    with ``prefix``, and removes its runs at the end. Not for use inside a running event loop.

    Args:
        target: A storage URL, or a function that makes a store object for a namespace.
        profile: The level to reach; checks above it are not run.
        seed: Decides what is left to chance.
        only: Ids of checks or of groups; a level is then not judged as reached.
        keyword: Words with ``and``, ``or``, ``not``, looked for in the names of the checks alone.
        prefix: 1 to 24 letters, digits, ``.``, ``_``, ``-``.
        progress: Called with each result.
        seen: What ``look`` found; by default it looks itself.

    Raises:
        ConfigurationError: The profile, an id, the prefix or the URL is wrong.
        StorageError: The store cannot be opened.
    """
    if profile not in LEVELS:
        raise ConfigurationError(
            f"there is no such profile: profile={profile!r}; give one of {', '.join(LEVELS)}"
        )
    url = target if isinstance(target, str) else None
    factory = _by_url(url) if url is not None else cast("Factory", target)
    started, start = datetime.now(UTC), monotonic()
    only = list(only)
    if seen is None:
        seen = look(target, prefix, at_once=wants_at_once(profile, only, keyword))
    info = seen.info
    names: list[str] = list(seen.namespaces)
    plugin = _Plugin(profile, _ids(only), chosen_by(keyword) if keyword else None, progress)

    def suite() -> type[StorageConformance]:
        from pyworkflow_conformance._target import suite_for

        declared = info.capabilities
        made = suite_for(
            _noted(factory, names), url=url, declared=declared, seed=seed, prefix=prefix
        )
        made.opened_first, made.opened_namespaces = seen.opened_first, seen.namespaces
        return made

    _pytest(plugin, suite)
    capabilities, levels = judge(plugin.all, plugin.results, info.capabilities, profile)
    for check in plugin.wanted():
        if check.id not in plugin.results:
            plugin.results[check.id] = Result(check.id, check.title, check.level, Status.MISSING)
    return Report(
        backend=info.name,
        location=info.location.replace(info.namespace, f"{prefix}*"),
        contract_version=info.contract_version,
        version=version("pyworkflow-core"),
        profile=profile,
        seed=seed,
        started=started.isoformat(timespec="seconds"),
        seconds=round(monotonic() - start, 1),
        capabilities=capabilities,
        levels=levels,
        level=highest(levels, plugin.results),
        results=[plugin.results[one] for one in plugin.all if one in plugin.results],
        remains=_remains(info, prefix),
        namespaces=list(dict.fromkeys(names)),
        unproved=_unproved(info, plugin.results) if url is not None else [],
    )


def _holds(expression: ast.expr) -> bool:
    """The value of an expression of True, False, and, or, not; ``SyntaxError`` for others."""
    match expression:
        case ast.Constant(value=bool(value)):
            return value
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _holds(operand)
        case ast.BoolOp(op=operator, values=values):
            parts = [_holds(each) for each in values]  # all of them, so that each is checked
            return all(parts) if isinstance(operator, ast.And) else any(parts)
        case _:
            raise SyntaxError("only words, and, or, not")


def chosen_by(keyword: str) -> Callable[[str], bool]:
    """Whether a check's name fits an expression of words with ``and``, ``or``, ``not``.

    Raises:
        ConfigurationError: It is no such expression.
    """

    def fits(name: str) -> bool:
        def told(word: re.Match[str]) -> str:
            text = word[0]
            if text in {"and", "or", "not"}:
                return text
            return str(text.lower().replace("-", "_") in name.lower())

        # Nothing is left but True, False, and, or, not and brackets.
        return _holds(ast.parse(re.sub(r"[^\s()]+", told, keyword).strip(), mode="eval").body)

    try:
        fits("")
    except SyntaxError as error:
        raise ConfigurationError(f"no expression of words: keyword={keyword!r}") from error
    return fits


def _noted(make: Factory, names: list[str]) -> Factory:
    """The same, with the namespaces noted."""

    def noted(namespace: str) -> StorageBackend | Awaitable[StorageBackend]:
        names.append(namespace)
        return make(namespace)

    return noted


def _unproved(info: StorageInfo, results: Mapping[str, Result]) -> list[str]:
    """Checks of a networked store that did not apply because the suite has a URL and no more."""
    if not info.capabilities.multi_host:
        return []
    known = checks()
    declared = {name for name in PROOFS if getattr(info.capabilities, name)}

    def is_for_the_suite(one: Result) -> bool:
        needs = known[one.id].needs
        if any(name in PROOFS and name not in declared for name in needs):
            return False
        return "server" in needs or "suite's make_" in one.reason

    return [
        one.id
        for one in results.values()
        if one.status is Status.NOT_APPLICABLE and is_for_the_suite(one)
    ]


def check_prefix(prefix: str) -> None:
    """Refuse what cannot begin the name of a namespace.

    Raises:
        ConfigurationError: It cannot.
    """
    from pyworkflow.testing.internals import check_namespace

    if not 1 <= len(prefix) <= 24:
        raise ConfigurationError(f"a prefix has 1 to 24 characters: namespace-prefix={prefix!r}")
    check_namespace(prefix, "namespace-prefix")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a first look found."""

    info: StorageInfo
    opened_first: Sequence[str] | None = None
    """What went wrong as eight processes opened the store at once; None: not tried."""
    namespaces: Sequence[str] = ()
    """Those that the processes used."""


def wants_at_once(profile: Level, only: Iterable[str] = (), keyword: str = "") -> bool:
    """Whether a run with these arguments includes the check of eight processes at once.

    Raises:
        ConfigurationError: The keyword is no expression of words.
    """
    ids = _ids(only)
    # Not asked of the checks: pytest has not prepared them yet.
    return (
        profile == "full"
        and (not ids or bool({"MIG", "MIG-08"} & ids))
        and (not keyword or chosen_by(keyword)(TEST.removeprefix("test_")))
    )


def _ids(only: Iterable[str]) -> set[str]:
    return {one.upper().replace("_", "-") for one in only}


def look(target: str | Factory, prefix: str = PREFIX, *, at_once: bool = False) -> Seen:
    """What the store says of itself, after proof that it can be opened.

    Args:
        target: As for ``run_conformance``.
        prefix: Begins the names of namespaces.
        at_once: Let eight processes open the store first, where they can. Only now may its
            database be empty.

    Raises:
        ConfigurationError: The prefix or the URL is wrong.
        StorageError: The store cannot be opened.
    """
    check_prefix(prefix)
    namespace = f"{prefix}look-{uuid4().hex[:12]}"
    factory = _by_url(target) if isinstance(target, str) else target
    problems, namespaces = None, list[str]()
    if at_once and isinstance(target, str):
        info = asyncio.run(_look(factory, namespace, opened=False))
        if info.capabilities.multi_process:
            namespaces = [namespace, f"{namespace}-other"]
            problems = by_processes(target, namespaces)
    # Their runs are removed by the check.
    return Seen(asyncio.run(_look(factory, namespace)), problems, namespaces)


def current_suite() -> type[StorageConformance]:
    """The class that the run in progress is about."""
    if not _running:
        raise ConfigurationError(
            "this module is collected by run_conformance alone: call it, or subclass "
            "pyworkflow_conformance.StorageConformance"
        )
    return _running[-1]()


def _by_url(url: str) -> Factory:
    from pyworkflow.testing.internals import make_storage

    return lambda namespace: make_storage(url, namespace)


async def _made(make: Factory, namespace: str) -> StorageBackend:
    made = make(namespace)
    return made if isinstance(made, StorageBackend) else await made


async def _look(make: Factory, namespace: str, *, opened: bool = True) -> StorageInfo:
    store = await _made(make, namespace)
    if not opened:
        await store.close()
        return store.info()
    async with store:
        await store.now()
        return store.info()


def _remains(info: StorageInfo, prefix: str) -> str:
    if not (info.capabilities.durable or info.capabilities.multi_process):
        return ""
    return (
        f"empty namespaces {prefix}*: their runs were removed, what the backend keeps for a "
        "namespace was not"
    )


def _pytest(plugin: _Plugin, suite: Callable[[], type[StorageConformance]]) -> None:
    """Run pytest on the suite alone: no settings, plugins, files or caches of anybody else."""
    here = Path(__file__).parent
    arguments: Sequence[str] = [
        str(here / "_entry.py"),
        f"--rootdir={here}",
        f"--config-file={os.devnull}",
        "--noconftest",
        "--import-mode=importlib",
        "--capture=sys",
        "-pno:cacheprovider",
        "-pno:terminal",
        "-pno:faulthandler",
        "-oxfail_strict=true",
    ]
    sys.modules.pop(_ENTRY, None)
    _running.append(suite)
    try:
        with tempfile.TemporaryDirectory() as scratch, _environment(scratch):
            status = pytest.main(list(arguments), plugins=[plugin])
    finally:
        _running.pop()
        sys.modules.pop(_ENTRY, None)
    if plugin.refusal is not None:
        raise plugin.refusal
    if status == pytest.ExitCode.INTERRUPTED and not plugin.errors:
        raise KeyboardInterrupt
    if plugin.errors:
        raise ConfigurationError("the suite cannot be run:\n" + "\n".join(plugin.errors))
    if status in {pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR} or not plugin.all:
        raise ConfigurationError(f"pytest could not run the suite: status={status!s}; see above")


@contextmanager
def _environment(scratch: str) -> Generator[None]:
    """Nobody's plugins and options for pytest, no folder in the current one for hypothesis."""
    changed = {
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "",
        "HYPOTHESIS_STORAGE_DIRECTORY": scratch,
    }
    before = {name: os.environ.get(name) for name in [*changed, "PYTEST_CURRENT_TEST"]}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Plugin:
    """Chooses the checks and takes down what becomes of them."""

    def __init__(
        self,
        profile: Level,
        only: set[str],
        keyword: Callable[[str], bool] | None,
        progress: Callable[[Result], None] | None,
    ) -> None:
        self._keyword = keyword
        self._profile = profile
        self._only = only
        self._progress = progress
        self.all: dict[str, Check] = {}
        self.results: dict[str, Result] = {}
        self.errors: list[str] = []
        self.refusal: ConfigurationError | None = None

    def wanted(self) -> list[Check]:
        """The checks of the profile."""
        highest = LEVELS.index(self._profile)
        return [one for one in self.all.values() if LEVELS.index(one.level) <= highest]

    def pytest_configure(self, config: pytest.Config) -> None:
        """Short tracebacks: the option itself belongs to the terminal, which is left out."""
        config.option.tbstyle = "short"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep what the profile and the caller want, in the order of the groups."""
        self.all = dict(checks())
        unknown = [
            one
            for one in sorted(self._only)
            if not any(one in {check, check.split("-")[0]} for check in self.all)
        ]
        if unknown:
            self.refusal = ConfigurationError(
                f"there are no such checks: ids={','.join(unknown)}; an id is like CON-01, "
                "a group like CON"
            )
            items.clear()
            return
        places = {
            check.name: place
            for place, check in enumerate(self.wanted())
            if (self._keyword is None or self._keyword(check.name.removeprefix("test_")))
            and (not self._only or {check.id, check.id.split("-")[0]} & self._only)
        }
        items[:] = sorted(
            (item for item in items if item.name in places), key=lambda item: places[item.name]
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A suite that cannot be imported is no result."""
        if report.failed:
            self.errors.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one check."""
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.rpartition("::")[2]
        check = next(check for check in self.all.values() if check.name == name)
        if check.id in self.results and self.results[check.id].status is Status.FAILED:
            return
        status, reason = _verdict(report)
        detail = report.longreprtext if status is Status.FAILED else ""
        duration = round(report.duration, 3)
        result = Result(check.id, check.title, check.level, status, duration, reason, detail)
        self.results[check.id] = result
        if self._progress is not None:
            self._progress(result)


def _verdict(report: pytest.TestReport) -> tuple[Status, str]:
    if report.skipped:
        if hasattr(report, "wasxfail"):
            reason = str(report.wasxfail).removeprefix("reason: ").removeprefix("declared gap: ")
            return Status.GAP, reason
        text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        text = text.removeprefix("Skipped: ")
        applies = not text.startswith("does not apply: ")
        return (Status.SKIPPED if applies else Status.NOT_APPLICABLE), text.removeprefix(
            "does not apply: "
        )
    if report.passed:
        return Status.PASSED, ""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(getattr(crash, "message", "") or report.longreprtext)
    return Status.FAILED, without_headline(message).partition("\n")[0][:200]

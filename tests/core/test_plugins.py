"""Plugins: found by URL scheme, loaded one by one, and unable to do harm."""

import asyncio
import logging
import re
import sys
import threading
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from textwrap import dedent
from types import SimpleNamespace

import pytest

from pyworkflow import Client, _config, _plugins
from pyworkflow._plugins import (
    around,
    ask,
    error_class,
    hooks_active,
    list_plugins,
    load_all,
    make_executor,
    make_storage,
    observe,
    observer_errors,
    register,
    unregister,
)
from pyworkflow.errors import ConfigurationError, PluginBroken, PluginNotFound
from pyworkflow.spi import ExecutorCapabilities, StorageBackend, hookimpl

#: A storage plugin whose backend records what its factory was given.
STORAGE = """
    from pyworkflow.spi import Capabilities, StorageBackend, StorageInfo, hookimpl

    class Backend(StorageBackend):
        def __init__(self, url, options):
            self.url, self.options = url, options

        def info(self):
            return StorageInfo(
                contract_version=2, name="shelf", location=self.url, capabilities=Capabilities()
            )

    Backend.__abstractmethods__ = frozenset()

    @hookimpl
    def pyworkflow_make_storage(url, options):
        return Backend(url, options)
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.delenv("PYWORKFLOW_DISABLE_PLUGINS", raising=False)
    monkeypatch.chdir(tmp_path)
    _config._reset_for_tests()
    _plugins._reset_for_tests()
    yield
    _config._reset_for_tests()
    _plugins._reset_for_tests()


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts a distribution on the path, as an installer does."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    added = []

    def install(distribution, points, source="", version="1.0"):
        module = distribution.replace("-", "_")
        (site / f"{module}.py").write_text(dedent(source))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = "".join(f"{point} = {module}\n" for point in points)
        (info / "entry_points.txt").write_text(f"[pyworkflow]\n{lines}")
        added.append(module)
        return module

    yield install
    for module in added:
        sys.modules.pop(module, None)


def info_of(name):
    return next(info for info in list_plugins() if info.name == name)


# --- lookups ------------------------------------------------------------------------------------


def test_the_scheme_picks_the_plugin_and_loads_no_other(install):
    first = install("shelf-one", ["shelf"], STORAGE)
    second = install("shelf-two", ["other"], STORAGE)
    made = make_storage("SHELF://where?colour=red&x=a%20b", "tenant")
    assert made.url == "SHELF://where?colour=red&x=a%20b"
    assert made.options == {"colour": "red", "x": "a b", "namespace": "tenant"}
    assert first in sys.modules
    assert second not in sys.modules
    assert make_storage("shelf://where") is not make_storage("shelf://where")


def test_one_module_may_serve_several_schemes(install):
    install("shelf", ["shelf", "shelfs"], STORAGE)
    assert isinstance(make_storage("shelf://a"), StorageBackend)
    assert isinstance(make_storage("shelfs://a"), StorageBackend)
    assert info_of("shelf").kinds == info_of("shelfs").kinds == ("storage",)


@pytest.mark.parametrize(
    ("url", "distribution"),
    [
        ("redis://:secret@host", "pyworkflow-storage-redis"),
        ("rediss://host", "pyworkflow-storage-redis"),
        ("sqlite:///a.db", "pyworkflow-storage-sql[sqlite]"),
        ("postgres://host/db", "pyworkflow-storage-sql[postgres]"),
        ("postgresql://host/db", "pyworkflow-storage-sql[postgres]"),
        ("file:data", "pyworkflow-storage-file"),
    ],
)
def test_a_well_known_scheme_without_plugin_names_what_serves_it(url, distribution, monkeypatch):
    monkeypatch.setattr(
        _plugins._catalogue,
        "_found",
        {name: found for name, found in _plugins._discover().items() if name == "memory"},
    )
    said = f"pip install '{distribution}'"
    with pytest.raises(PluginNotFound, match=re.escape(said)) as caught:
        make_storage(url)
    assert caught.value.distribution == distribution
    assert "secret" not in str(caught.value)


def test_an_unknown_scheme_is_told_apart_by_kind(install):
    with pytest.raises(PluginNotFound, match="storage URLs of the scheme 'nowhere'"):
        make_storage("nowhere://x")
    with pytest.raises(PluginNotFound, match="executor URLs of the scheme 'nowhere'"):
        make_executor("nowhere://x")
    with pytest.raises(PluginNotFound, match="executor URLs of the scheme 'memory'"):
        make_executor("memory://")
    install("shelf", ["shelf"], STORAGE)
    with pytest.raises(PluginNotFound, match="executor URLs of the scheme 'shelf'"):
        make_executor("shelf://x")


def test_two_distributions_for_one_scheme_are_both_named_and_one_can_be_chosen(
    install, monkeypatch
):
    install("shelf-a", ["shelf"], STORAGE)
    install("shelf-b", ["shelf"], STORAGE)
    with pytest.raises(ConfigurationError, match=r"shelf-a 1\.0 and shelf-b 1\.0"):
        make_storage("shelf://x")
    assert {(i.distribution, i.status) for i in list_plugins() if i.name == "shelf"} == {
        ("shelf-a", "conflict"),
        ("shelf-b", "conflict"),
    }
    monkeypatch.setenv("PYWORKFLOW_DISABLE_PLUGINS", "shelf_a")
    _config._reset_for_tests()
    assert make_storage("shelf://x").__module__ == "shelf_b"


def test_a_stranger_cannot_take_the_scheme_of_the_core(install):
    install("shelf", ["memory"], STORAGE)
    with pytest.raises(ConfigurationError, match=r"pyworkflow-core.*shelf"):
        make_storage("memory://")


def test_a_broken_plugin_is_reported_by_its_lookup_and_stops_no_other(install, caplog):
    install("shelf-bad", ["bad"], "import a_module_that_is_not_there")
    install("shelf-exit", ["exits"], "raise SystemExit(3)")
    install("shelf-good", ["good"], STORAGE)
    with caplog.at_level(logging.WARNING):
        infos = {info.name: info for info in load_all()}
    assert infos["good"].status == "loaded"
    assert infos["bad"].status == infos["exits"].status == "broken"
    assert (infos["bad"].distribution, infos["bad"].version) == ("shelf-bad", "1.0")
    assert infos["bad"].error == (
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    )
    assert "shelf-bad" in caplog.text
    for _ in range(2):
        with pytest.raises(PluginBroken, match="a_module_that_is_not_there") as caught:
            make_storage("bad://x")
        assert (caught.value.name, caught.value.distribution) == ("bad", "shelf-bad")
    assert isinstance(make_storage("good://x"), StorageBackend)


@pytest.mark.parametrize(
    ("hook", "match"),
    [
        ("def pyworkflow_make_storage(uri): ...", "uri"),
        ("async def pyworkflow_make_storage(url, options): ...", "is async"),
    ],
)
def test_hooks_of_the_wrong_form_break_their_plugin_only(install, hook, match):
    source = f"from pyworkflow.spi import hookimpl\n@hookimpl\n{hook}\n"
    install("shelf", ["shelf"], source)
    with pytest.raises(PluginBroken, match=match):
        make_storage("shelf://x")
    assert info_of("memory").status == "loaded"
    assert not hooks_active("pyworkflow_run_created")


def test_a_wrapper_is_refused_and_an_unknown_hook_is_told(caplog):
    class Wrapper:
        @hookimpl(wrapper=True)
        def pyworkflow_run_created(self):
            return (yield)

    with pytest.raises(ConfigurationError, match="is a pluggy wrapper"):
        register(Wrapper())
    assert not hooks_active("pyworkflow_run_created")

    class Newer:
        @hookimpl
        def pyworkflow_invented_later(self): ...

    with caplog.at_level(logging.WARNING):
        register(Newer())
    assert "hook=pyworkflow_invented_later" in caplog.text
    assert not hooks_active("pyworkflow_invented_later")


def test_a_disabled_plugin_is_not_imported_and_says_why(install, monkeypatch):
    module = install("shelf", ["shelf"], "raise AssertionError('imported')")
    monkeypatch.setenv("PYWORKFLOW_DISABLE_PLUGINS", "nothing, Shelf")
    with pytest.raises(ConfigurationError, match="PYWORKFLOW_DISABLE_PLUGINS"):
        make_storage("shelf://x")
    assert info_of("shelf").status == "disabled"
    assert module not in sys.modules


def test_what_a_factory_raises_reaches_the_caller_without_credentials(install):
    install(
        "shelf",
        ["shelf"],
        """
        from pyworkflow.errors import ConfigurationError
        from pyworkflow.spi import hookimpl

        @hookimpl
        def pyworkflow_make_storage(url, options):
            if "driver" in options:
                raise ImportError("no driver")
            if "wrong" in options:
                raise ConfigurationError("mine")
            if "other" in options:
                return object()
            raise ValueError(f"what is {url}")
        """,
    )
    with pytest.raises(PluginBroken, match="no driver"):
        make_storage("shelf://?driver=1")
    with pytest.raises(ConfigurationError, match=r"^mine$"):
        make_storage("shelf://?wrong=1")
    with pytest.raises(ConfigurationError, match="type=object"):
        make_storage("shelf://?other=1")
    with pytest.raises(ConfigurationError, match="ValueError: what is") as caught:
        make_storage("shelf://me:secret@host")
    assert "secret" not in str(caught.value)


def test_a_namespace_is_checked_and_no_option():
    with pytest.raises(ConfigurationError, match="namespace"):
        make_storage("memory://", "../other")
    with pytest.raises(ConfigurationError, match="setting namespace"):
        make_storage("memory://?namespace=x")


def test_a_plugin_gets_an_absolute_path(install, tmp_path, monkeypatch):
    monkeypatch.setenv("PYWORKFLOW_DISABLE_PLUGINS", "pyworkflow-storage-sql")
    install("shelf", ["sqlite"], STORAGE)
    assert make_storage("sqlite:///a.db").url == f"sqlite:///{tmp_path}/a.db"


def test_executors_get_the_configuration_overridden_by_the_query(install):
    install(
        "shelf",
        ["shelf"],
        """
        from pyworkflow.spi import ExecutorCapabilities, hookimpl

        class Executor:
            name = "shelf"
            capabilities = ExecutorCapabilities(contract_version=2)
            def __init__(self, options): self.options = options
            async def open(self, config): ...
            async def notify(self, bells): ...
            def serve(self, runtime, queues): ...
            async def close(self): ...

        @hookimpl
        def pyworkflow_make_executor(url, options):
            return Executor(options) if "bad" not in options else "an executor"
        """,
    )
    made = make_executor("shelf://?b=3", {"a": "1", "b": "2"})
    assert made.options == {"a": "1", "b": "3"}
    assert info_of("shelf").kinds == ("executor",)
    with pytest.raises(ConfigurationError, match="type=str"):
        make_executor("shelf://?bad=1")


def test_the_plugins_of_the_core_work_without_installed_entry_points():
    found = _plugins._discover()
    assert {"local", "memory"} <= set(found)
    assert [one.distribution for one in found["memory"]] == ["pyworkflow-core"]


def test_memory_urls_are_private_or_shared_by_name_and_namespace():
    async def hours_ahead(one, other):
        return round((await one.now() - await other.now()) / timedelta(hours=1))

    async def check():
        shared = make_storage("memory://of-this-test")
        clone = make_storage("memory://of-this-test")
        elsewhere = make_storage("memory://of-this-test", "tenant")
        private, another = make_storage("memory://"), make_storage("memory://")
        await shared.shift_clock(timedelta(hours=5))
        await private.shift_clock(timedelta(hours=3))
        assert shared is not clone
        assert await hours_ahead(shared, clone) == 0
        assert await hours_ahead(shared, elsewhere) == 5
        assert await hours_ahead(private, another) == 3
        await shared.close()
        await clone.now()

    asyncio.run(check())
    with pytest.raises(ConfigurationError, match="options=speed"):
        make_storage("memory://?speed=1")


# --- the application's plugins --------------------------------------------------------------------


def test_a_registered_plugin_serves_its_urls_before_the_installed_ones(install):
    install("shelf", ["shelf"], STORAGE)

    class Mine:
        @hookimpl
        def pyworkflow_make_storage(self, url):
            return make_storage("shelf://inner") if url == "shelf://mine" else None

    mine = Mine()
    register(mine, "mine")
    register(mine, "again")
    assert make_storage("shelf://mine").url == "shelf://inner"
    assert make_storage("shelf://theirs").url == "shelf://theirs"
    assert (info_of("mine").kinds, info_of("mine").distribution) == (("storage",), "")
    unregister(mine)
    unregister(mine)
    assert make_storage("shelf://mine").url == "shelf://mine"
    assert all(info.name != "mine" for info in list_plugins())


def test_a_taken_name_is_refused():
    register(SimpleNamespace(), "mine")
    with pytest.raises(ConfigurationError, match="plugin=mine"):
        register(SimpleNamespace(a=1), "mine")


# --- observers ------------------------------------------------------------------------------------


class Observer:
    def __init__(self, error=None):
        self.seen = []
        self.error = error

    @hookimpl
    def pyworkflow_run_created(self, run_id):
        self.seen.append(run_id)
        if self.error is not None:
            raise self.error


def test_observers_are_called_with_what_they_take_and_only_when_there_are_some():
    observe("pyworkflow_run_created", run_id="r0", workflow="w")
    assert not hooks_active("pyworkflow_run_created")
    observer = Observer()
    register(observer)
    assert hooks_active("pyworkflow_run_created")
    assert not hooks_active("pyworkflow_run_ended")
    observe("pyworkflow_run_created", run_id="r1", workflow="w")
    unregister(observer)
    observe("pyworkflow_run_created", run_id="r2", workflow="w")
    assert observer.seen == ["r1"]


@pytest.mark.parametrize(
    "error", [ValueError("broken"), asyncio.CancelledError(), GeneratorExit(), SystemExit(1)]
)
def test_an_observer_that_raises_is_counted_and_silences_no_other(error, caplog):
    before, broken, after = Observer(), Observer(error), Observer()
    for name, plugin in (("a", before), ("b", broken), ("c", after)):
        register(plugin, name)
    with caplog.at_level(logging.ERROR):
        for number in range(25):
            observe("pyworkflow_run_created", run_id=f"r{number}", workflow="w")
    assert len(before.seen) == len(broken.seen) == len(after.seen) == 25
    assert observer_errors == {("b", "pyworkflow_run_created"): 25}
    logged = [r for r in caplog.records if "hook failed" in r.getMessage()]
    assert [r.getMessage().rpartition("=")[2] for r in logged] == ["1", "10"]
    assert logged[0].exc_info is not None


def test_only_ctrl_c_passes_an_observer_and_that_only_in_the_main_thread():
    register(Observer(KeyboardInterrupt()), "o")
    with pytest.raises(KeyboardInterrupt):
        observe("pyworkflow_run_created", run_id="r", workflow="w")
    assert observer_errors.total() == 0
    thread = threading.Thread(
        target=observe, args=("pyworkflow_run_created",), kwargs={"run_id": "r", "workflow": "w"}
    )
    thread.start()
    thread.join()
    assert observer_errors == {("o", "pyworkflow_run_created"): 1}


def test_an_observer_that_lacks_an_argument_of_a_caller_is_counted():
    register(Observer(), "o")
    observe("pyworkflow_run_created", workflow="w")
    assert observer_errors.total() == 1


def test_the_first_opinion_counts_and_a_broken_one_is_none():
    class Opinion:
        def __init__(self, answer):
            self.answer = answer

        @hookimpl
        def pyworkflow_error_class(self, exc):
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    assert error_class(ValueError()) is None
    assert ask("pyworkflow_error_class", exc=ValueError()) is None
    register(Opinion("fatal"), "first")
    register(Opinion(None), "second")
    register(Opinion(RuntimeError("broken")), "third")
    assert error_class(ValueError()) == "fatal"
    retry = Opinion("retry")
    register(retry, "fourth")
    assert error_class(ValueError()) == "retry"
    retry.answer = ["nonsense"]
    assert error_class(ValueError()) is None


# --- context managers -----------------------------------------------------------------------------


def around_step(**kwargs):
    arguments = {"run_id": "r", "workflow": "w", "step_id": "s", "step_name": "n", "attempt": 1}
    return around("pyworkflow_around_step", **{**arguments, **kwargs})


class Around:
    def __init__(self, log, name, enter=None, leave=None, swallow=False):
        self.log, self.name, self.enter, self.leave = log, name, enter, leave
        self.swallow = swallow

    @hookimpl
    @contextmanager
    def pyworkflow_around_step(self, step_name):
        if self.enter:
            raise self.enter
        self.log.append(f"+{self.name}:{step_name}")
        try:
            yield
        except BaseException as error:
            self.log.append(f"!{self.name}:{type(error).__name__}")
            if not self.swallow:
                raise
        finally:
            self.log.append(f"-{self.name}")
            if self.leave:
                raise self.leave


def test_managers_nest_and_cost_nothing_when_there_are_none():
    assert isinstance(around_step(), nullcontext)
    log = []
    register(Around(log, "a"), "a")
    register(Around(log, "b"), "b")
    with around_step(step_name="charge"):
        log.append("body")
    assert log == ["+b:charge", "+a:charge", "body", "-a", "-b"]


@pytest.mark.parametrize("error", [KeyError("body"), asyncio.CancelledError("body")])
def test_the_exception_of_the_body_passes_whatever_managers_do(error):
    log = []
    register(Around(log, "swallows", swallow=True), "swallows")
    register(Around(log, "replaces", leave=RuntimeError("mine")), "replaces")
    register(Around(log, "never enters", enter=RuntimeError("mine")), "never")
    register(Around(log, "sees"), "sees")
    with pytest.raises(type(error)) as caught, around_step():
        raise error
    assert caught.value is error
    assert f"!swallows:{type(error).__name__}" in log
    assert f"!sees:{type(error).__name__}" in log
    assert not any("never enters" in line for line in log)
    hook = "pyworkflow_around_step"
    assert observer_errors == {("replaces", hook): 1, ("never", hook): 1}


def test_a_manager_that_fails_leaves_the_body_alone():
    log = []
    register(Around(log, "a", leave=RuntimeError("mine")), "a")

    class Nothing:
        @hookimpl
        def pyworkflow_around_step(self):
            return None

    class Nonsense:
        @hookimpl
        def pyworkflow_around_step(self):
            return 5

    register(Nothing(), "nothing")
    register(Nonsense(), "nonsense")
    with around_step():
        log.append("body")
    assert log == ["+a:n", "body", "-a"]
    assert {plugin for plugin, _ in observer_errors} == {"a", "nonsense"}


class _Far:
    """Stands for an executor whose workers are other processes."""

    name = "far"
    capabilities = ExecutorCapabilities(contract_version=2, distributed=True)

    async def open(self, config): ...
    async def notify(self, bells): ...
    def serve(self, runtime, queues): ...
    async def close(self): ...


def test_workers_elsewhere_and_a_store_of_this_process_do_not_go_together():
    async def main():
        async with Client(storage="memory://", executor=_Far()):
            pass

    with pytest.raises(ConfigurationError, match=r"memory.*set PYWORKFLOW_STORAGE"):
        asyncio.run(main())


def test_the_default_store_beside_workers_elsewhere_is_warned_of(monkeypatch, tmp_path, caplog):
    async def main(storage):
        async with Client(storage=storage, executor=_Far()) as client:
            await client.list_runs()

    monkeypatch.delenv("PYWORKFLOW_STORAGE", raising=False)
    with caplog.at_level(logging.WARNING, "pyworkflow"):
        asyncio.run(main(f"file://{tmp_path}/.pyworkflow"))
        assert "no storage is set" not in caplog.text
        asyncio.run(main(None))
    assert (
        f"no storage is set, so runs are kept here: storage={tmp_path}/.pyworkflow" in caplog.text
    )

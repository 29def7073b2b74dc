"""Settings: precedence, forms, and the moment from which they stand."""

import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest

from pyworkflow import _config
from pyworkflow._config import configure, provisional_settings, settings
from pyworkflow._urls import parse_url, redact_url, resolve_url
from pyworkflow.errors import ConfigurationError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    for name in _config._PARSERS:
        monkeypatch.delenv(f"PYWORKFLOW_{name.upper()}", raising=False)
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    _config._reset_for_tests()
    yield
    _config._reset_for_tests()


def project(tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(f"[tool.pyworkflow]\n{text}\n")


def test_defaults_are_those_of_the_table(tmp_path):
    found = settings()
    assert found.storage == f"file://{tmp_path}/.pyworkflow"
    assert found.executor == "local://"
    assert (found.namespace, found.modules, found.disable_plugins) == ("default", (), ())
    assert found.broker_url == "redis://localhost:6379/0"
    assert (found.lease, found.renew_every, found.mute) == (
        timedelta(seconds=60),
        timedelta(seconds=20),
        timedelta(seconds=30),
    )
    assert (found.max_payload, found.max_history) == (2 * 1024 * 1024, 51_200)
    assert (found.concurrency, found.sessions) == (100, 10_000)
    assert 1 <= found.threads <= 32
    assert found.key_retention == timedelta(days=30)


def test_configure_beats_environment_beats_project_beats_default(tmp_path, monkeypatch):
    project(tmp_path, 'mute = "1s"\nlease = "2m"\nmax_history = 7')
    monkeypatch.setenv("PYWORKFLOW_LEASE", "3m")
    monkeypatch.setenv("PYWORKFLOW_MAX_HISTORY", "8")
    configure(max_history=9)
    found = settings()
    assert (found.mute, found.lease, found.max_history) == (
        timedelta(seconds=1),
        timedelta(minutes=3),
        9,
    )


def test_the_nearest_project_file_upwards_counts(tmp_path, monkeypatch):
    project(tmp_path, 'namespace = "outer"\nstorage = "file:data"')
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert settings().namespace == "outer"
    assert settings().storage == f"file://{tmp_path}/data", "relative to the project file"
    _config._reset_for_tests()
    (tmp_path / "a" / "pyproject.toml").write_text("[project]\nname = 'x'")
    assert settings().namespace == "default"


def test_nothing_is_read_before_first_use(tmp_path, monkeypatch):
    project(tmp_path, "lease = 0")
    configure(namespace="a")
    configure(namespace="b", mute="5s")
    monkeypatch.setenv("PYWORKFLOW_LEASE", "9s")
    project(tmp_path, "")
    found = settings()
    assert (found.namespace, found.lease, found.mute) == (
        "b",
        timedelta(seconds=9),
        timedelta(seconds=5),
    )
    monkeypatch.setenv("PYWORKFLOW_LEASE", "10s")
    assert settings() is found


def test_a_bad_project_value_is_reported_at_first_use_and_read_again(tmp_path):
    project(tmp_path, "lease = 0")
    with pytest.raises(ConfigurationError) as caught:
        settings()
    text = str(caught.value)
    assert "setting=lease" in text
    assert f"lease in [tool.pyworkflow] of {tmp_path / 'pyproject.toml'}" in text
    assert "duration like '60s'" in text
    project(tmp_path, "lease = 5")
    assert settings().lease == timedelta(seconds=5)


def test_configure_after_first_use_accepts_only_what_stands():
    configure(lease="30s")
    assert settings().lease == timedelta(seconds=30)
    configure(lease=30, storage="file:.pyworkflow")
    with pytest.raises(ConfigurationError, match="already in use: setting=lease"):
        configure(lease="31s")
    with pytest.raises(ConfigurationError, match=r"redis://:\*\*\*@host"):
        configure(storage="redis://:secret@host")
    assert settings().lease == timedelta(seconds=30)


def test_unknown_settings_name_the_close_ones(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="did you mean storage"):
        configure(storge="memory://")
    with pytest.raises(ConfigurationError, match="there are storage, executor"):
        configure(zzz=1)
    with pytest.raises(ConfigurationError, match="setting=zzz"):
        configure(zzz=None)
    monkeypatch.setenv("PYWORKFLOW_STORGE", "memory://")
    with pytest.raises(ConfigurationError, match=r"PYWORKFLOW_STORGE.*did you mean storage"):
        settings()
    monkeypatch.delenv("PYWORKFLOW_STORGE")
    for variable, setting in (("STORE", "storage"), ("BROKER", "broker_url")):
        with monkeypatch.context() as m:
            m.setenv(f"PYWORKFLOW_{variable}", "redis://host/0")
            with pytest.raises(ConfigurationError, match=f"did you mean {setting}"):
                settings()
    monkeypatch.setenv("PYWORKFLOW_TEST_SERVER_OF_OURS", "1")
    project(tmp_path, "max-payload = 1")
    with pytest.raises(ConfigurationError, match="did you mean max_payload"):
        settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("storage", ""),
        ("storage", "no-scheme"),
        ("storage", 5),
        ("storage", object()),
        ("executor", object()),
        ("namespace", "../x"),
        ("namespace", ""),
        ("namespace", "x" * 65),
        ("modules", [""]),
        ("modules", 3),
        ("lease", "soon"),
        ("lease", True),
        ("lease", "-5s"),
        ("lease", float("nan")),
        ("max_payload", "2 apples"),
        ("max_payload", 0),
        ("max_history", 1.5),
        ("concurrency", True),
        ("concurrency", "many"),
        ("sessions", -1),
        ("broker_url", "localhost"),
    ],
)
def test_values_of_the_wrong_form_name_setting_and_source(name, value):
    with pytest.raises(ConfigurationError) as caught:
        configure(**{name: value})
    assert f"setting={name}" in str(caught.value)
    assert f"source=configure({name}=...)" in str(caught.value)
    assert name not in _config._state.configured


def test_an_empty_variable_is_an_error_and_never_the_default(monkeypatch):
    monkeypatch.setenv("PYWORKFLOW_STORAGE", "")
    with pytest.raises(ConfigurationError, match="source=PYWORKFLOW_STORAGE"):
        settings()


def test_text_forms_of_the_environment(monkeypatch):
    monkeypatch.setenv("PYWORKFLOW_MODULES", "shop.orders, shop.mail,")
    monkeypatch.setenv("PYWORKFLOW_DISABLE_PLUGINS", "redis")
    monkeypatch.setenv("PYWORKFLOW_MAX_PAYLOAD", "4 MiB")
    monkeypatch.setenv("PYWORKFLOW_CONCURRENCY", "3")
    monkeypatch.setenv("PYWORKFLOW_KEY_RETENTION", "1w")
    found = settings()
    assert found.modules == ("shop.orders", "shop.mail")
    assert found.disable_plugins == ("redis",)
    assert found.max_payload == 4 * 1024 * 1024
    assert (found.concurrency, found.threads) == (3, 3)
    assert found.key_retention == timedelta(weeks=1)


def test_renewal_follows_a_lease_that_is_set_alone_and_must_be_shorter():
    configure(lease="3s")
    with pytest.raises(ConfigurationError, match="renew_every"):
        configure(renew_every="3s")
    assert settings().renew_every == timedelta(seconds=1)


def test_celery_broker_url_counts_when_nothing_else_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://one")
    assert settings().broker_url == "amqp://one"
    _config._reset_for_tests()
    project(tmp_path, 'broker_url = "amqp://two"')
    assert settings().broker_url == "amqp://two"


def test_a_storage_object_is_kept_as_it_is_even_when_falsy():
    class Falsy:
        def commit(self): ...

        def info(self):
            return SimpleNamespace(contract_version=2)

        def __bool__(self):
            return False

    mine = Falsy()
    configure(storage=mine)
    assert settings().storage is mine
    configure(storage=mine)
    with pytest.raises(ConfigurationError, match="already in use"):
        configure(storage=Falsy())


def test_settings_show_no_credentials():
    configure(storage="redis://:secret@host", broker_url="redis://:secret@host")
    assert "secret" not in repr(settings())
    with pytest.raises(ConfigurationError) as caught:
        configure(storage="postgresql://me:se/cr@et@host/db x\n")
    assert "et@" not in str(caught.value)
    assert "se/cr" not in str(caught.value)


def test_an_unreadable_project_file_is_named(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[[[")
    with pytest.raises(ConfigurationError, match=r"file=.*pyproject\.toml"):
        settings()
    (tmp_path / "pyproject.toml").write_text("[tool]\npyworkflow = 3")
    with pytest.raises(ConfigurationError, match="not a table"):
        settings()


def test_importing_loads_neither_pydantic_nor_asyncio_nor_pluggy():
    code = (
        "import sys; import pyworkflow._config, pyworkflow._hooks, pyworkflow._plugins; "
        "print([m for m in ('asyncio', 'pydantic', 'pluggy', 'tomllib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("file:data", "file:///base/data"),
        ("file:./data?fsync=0", "file:///base/data?fsync=0"),
        ("file:../data", "file:///data"),
        ("file:///abs/data", "file:///abs/data"),
        ("FILE:data", "file:///base/data"),
        ("sqlite:///a.db", "sqlite:////base/a.db"),
        ("sqlite:////abs/a.db", "sqlite:////abs/a.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("memory://x", "memory://x"),
        ("redis://host/0", "redis://host/0"),
    ],
)
def test_relative_paths_are_resolved_once(tmp_path, url, resolved):
    base = tmp_path / "50%? #1"
    quoted = f"{tmp_path}/50%25%3F %231"
    inside = resolved.replace("/base/", f"{quoted}/")
    parent = resolved.replace("file:///data", f"file://{tmp_path}/data")
    expected = parent if ".." in url else inside
    assert resolve_url(url, base) == expected
    assert resolve_url(expected, base / "elsewhere") == expected


def test_a_current_directory_that_is_gone_needs_an_absolute_path(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match="current directory does not exist"):
        settings()
    configure(storage="file:///data")
    assert settings().storage == "file:///data"


def test_a_home_directory_that_only_a_shell_expands_is_refused():
    with pytest.raises(ConfigurationError, match="only a shell expands"):
        configure(storage="file:~/data")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@host:6379/0", "redis://:***@host:6379/0"),
        ("postgresql://me:p@s/s?w#d@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db?schema=x", "postgresql://me@host/db?schema=x"),
        (
            "redis://host?password=a&db=1&auth%5Ftoken=b",
            "redis://host?password=***&db=1&auth%5Ftoken=***",
        ),
        ("postgres:me:pw@host", "postgres:***@host"),
        ("me@host", "***@host"),
        ("file:///srv/a:b@c", "file:///srv/a:b@c"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_credentials_are_hidden(url, shown):
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (None, "not text"),
        ("data/dir", "for a path file:data/dir"),
        ("://x", "no scheme"),
        ("C:\\data", "drive letter"),
        ("file:x\n", "blanks"),
        ("memory://?a=1&a=2", "option=a"),
    ],
)
def test_nonsense_urls_get_a_clear_error(url, match):
    with pytest.raises(ConfigurationError, match=match):
        parse_url(url)


def test_a_url_is_taken_apart():
    parsed = parse_url("PostgreSQL://me@host/db?schema=a%20b&flag=#frag")
    assert (parsed.scheme, parsed.options) == ("postgresql", {"schema": "a b", "flag": ""})


def test_provisional_settings_are_not_final():
    assert provisional_settings().lease == timedelta(seconds=60)
    configure(lease="45s")
    assert provisional_settings().lease == timedelta(seconds=45)
    assert settings() is provisional_settings()
    with pytest.raises(ConfigurationError, match="already in use"):
        configure(lease="31s")

"""URLs of stores and brokers: two names are two stores, and no text shows a password."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pyworkflow._config import configure
from pyworkflow._plugins import make_executor, make_storage
from pyworkflow._urls import parse_url, redact_url, resolve_url
from pyworkflow.errors import ConfigurationError, WorkflowError


@pytest.mark.parametrize("name", ["a#1", "a#", "#", "a#1#2", "a b#c%20d", "a;b=c", "ü#ß", "100%"])
@pytest.mark.parametrize(
    ("scheme", "end"), [("file:", ""), ("file:", "/runs"), ("sqlite:///", ".db")]
)
def test_v11_a_hash_is_part_of_a_files_name(
    scheme: str, end: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = str(tmp_path / (name.replace("%20", " ") + end))
    for url in (scheme + name + end, resolve_url(scheme + name + end, tmp_path)):
        assert make_storage(url).info().location == place


@pytest.mark.parametrize("folder", ["a#1", "a?b", "100%", "a%20b", "a#?%"])
def test_v11_a_current_directory_may_have_any_name(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    for url in ("file:runs", "sqlite:///runs"):
        assert make_storage(url).info().location.endswith(f"{folder}/runs")


@pytest.mark.parametrize(
    "url",
    [
        "memory://#1", "memory://a#1", "redis://h/0#1", "postgresql://u@h/db#1",
        "postgresql://u:p#w@h/db", "file:a?b", "file:a?", "sqlite:///a.db?", "file:a?b?c=d",
        "file:a%ffb", "sqlite:///%fe.db", "sqlite:///a.db/", "file:a%00b",
    ],
)  # fmt: skip
def test_v11_what_would_be_ignored_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        make_storage(url)
    assert "p#w" not in str(refused.value)


def test_v11_the_urls_of_executors_and_brokers_have_no_fragment() -> None:
    with pytest.raises(ConfigurationError, match="%23"):
        make_executor("local://#1")
    with pytest.raises(ConfigurationError, match="%23") as refused:
        configure(broker_url="redis://:p#s3cret@h/0")
    assert "s3cret" not in str(refused.value)


SECRETS = [
    ("host=db user=u password=s3cret dbname=x", "host=db user=u password=*** dbname=x"),
    ("host=db password = 's3 \\' cret' port=1", "host=db password = *** port=1"),
    ("password='s3cret", "password=***"),
    ("user=u sslpassword=s3cret PGPASSWORD=s3cret", "user=u sslpassword=*** PGPASSWORD=***"),
    ("postgresql://u@h/db#s3cret", "postgresql://u@h/db#***"),
    ("redis://h/0;password=s3cret;x=1", "redis://h/0;password=***;x=1"),
    ("postgresql:u:s3cret/h", "postgresql:u:***"),
    ("postgresql:u:s3cret@h/db", "postgresql:***@h/db"),
    ("postgresql://u:s3cret/db", "postgresql://u:***"),
    ("postgresql://u:s3cret", "postgresql://u:***"),
    ("redis://:s3cret", "redis://:***"),
    ("redis://:12s3cret/0", "redis://:***"),
    ("postgresql://u:s3:cret@h:1/db", "postgresql://u:***@h:1/db"),
    ("file://u:s3cret@h/srv", "file://***"),
    ("sqlite://u:s3/cret@h/a.db", "sqlite://***"),
    ("sqlite:///a.db?key=s3cret&cache=1", "sqlite:///a.db?key=***&cache=1"),
    ("sqlite:///a.db;password=s3cret", "sqlite:///a.db;password=***"),
    ("redis://h/0?ssl_keyfile_password=s3cret&db=1", "redis://h/0?ssl_keyfile_password=***&db=1"),
    ("redis://h/0?api%4Bey=s3cret&token=s3cret", "redis://h/0?api%4Bey=***&token=***"),
    ("amqp://u:s3cret@h//;amqp://v:s3cret@i//", "amqp://u:***@i//"),
    ("u:s3cret@h", "u:***@h"),
]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_l01_no_form_of_a_url_shows_a_secret(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@h:5432,i:5433/db?schema=x", "redis://[::1]:6379/0", "file:///a;b/c=d",
        "postgresql:///db?host=/run/pg&user=u", "redis://h:6379", "memory://x", "celery://",
        "host=db user=u dbname=x", "file:a#1/key", "some text",
    ],
)  # fmt: skip
def test_l01_what_is_no_secret_is_shown(url: str) -> None:
    assert redact_url(url) == url


@pytest.mark.parametrize("url", [url for url, _ in SECRETS])
def test_l01_no_error_log_or_repr_repeats_a_secret(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said = []
    for call in (
        lambda: configure(storage=url),
        lambda: configure(executor=url),
        lambda: make_storage(url),
        lambda: make_executor(url),
        lambda: configure(broker_url=url + "#"),
        lambda: said.append(repr(parse_url(url))),
    ):
        try:
            call()
        except WorkflowError as error:
            said.append(f"{error} {error.args} {error.__cause__}")
    from pyworkflow._config import settings

    said.append(repr(settings()))
    assert "cret" not in " ".join(said) + caplog.text

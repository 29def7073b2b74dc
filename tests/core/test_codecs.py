"""Payload codecs.

What they guarantee: every value comes back equal, whatever codecs wrote it and whatever the
settings are by now; what is stored tells codecs, order and key id, and stays JSON; nothing that was
encrypted is readable in the store; a payload that cannot be unwrapped stalls its run (or leaves its
step to another worker), with a message that says what to do, and is never lost; no key is shown.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import fields
from dataclasses import replace as replace_fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyworkflow import _config, _plugins, _serialization, step, workflow
from pyworkflow._codecs import _chain, _offload, sweep_offloaded, writer_for
from pyworkflow._codecs._form import FORM
from pyworkflow._codecs._offload import OffloadCodec
from pyworkflow._config import CodecKeys
from pyworkflow._serialization import (
    decode,
    decode_arguments,
    decode_error,
    digest_arguments,
    encode,
    encode_arguments,
    is_wrapped,
    unwrapped,
)
from pyworkflow.errors import (
    ConfigurationError,
    IdempotencyConflict,
    PayloadTooLarge,
    PayloadUnreadable,
    RetryableError,
    RunCancelled,
    SerializationError,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow.event_schema import validate_event
from pyworkflow.spi import Codec, StorageInfo, hookimpl
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.storage.memory import MemoryStorageBackend
from pyworkflow.testing import History, replay
from tests.core._driving import Bench, bench, eventually

ONE, TWO = b"1" * 32, b"2" * 32
KEY_1 = f"k1:{base64.b64encode(ONE).decode()}"
KEY_2 = f"k2:{base64.b64encode(TWO).decode()}"
SECRET = "the secret of the sphinx"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("PYWORKFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    use()
    yield
    _config._reset_for_tests()
    _chain._reset_for_tests()
    _plugins._reset_for_tests()


def use(**given: Any) -> dict[str, Any]:
    """Make this a process with these settings; the codec settings, for a bench."""
    _config._reset_for_tests()
    _chain._reset_for_tests()
    if given:
        _config.configure(**given)
    made = _config.settings()
    return {f.name: getattr(made, f.name) for f in fields(made) if f.name.startswith("codec")} | {
        "max_payload": made.max_payload
    }


async def become(bench: Bench, **given: Any) -> None:
    """The bench's worker ends, and one of a process with other settings begins."""
    await bench.rest()
    for name, value in use(**given).items():
        object.__setattr__(bench.settings, name, value)
    await bench.work()


def wrap(text: str) -> str:
    writer = writer_for(_config.settings())
    assert writer is not None
    return writer.wrap(text)


def names(text: str) -> list[str]:
    return [name for name, _ in json.loads(text)["c"]]


async def raw(bench: Bench, run_id: str) -> str:
    """Everything that the store has of a run."""
    events = [(e.type, e.data) for e in await bench.storage.get_events(run_id)]
    items = [i.payload for i in await bench.storage.list_work(run_id)]
    run = await bench.get(run_id)
    error = None if run.error is None else run.error.to_json()
    return json.dumps([events, items, run.args_text, run.result_text, error, run.stalled])


@step
async def coded_double(text: str) -> str:
    return text * 2


@step(queue="default")
async def coded_queued(text: str) -> str:
    return text + "!"


@step(max_retries=0)
async def coded_break_down(text: str) -> str:
    raise ValueError(f"cannot do {text}")


@step(max_retries=3, retry_delay=0)
async def coded_second_time(text: str) -> str:
    attempts.append(text)
    if len(attempts) < 2:
        raise RetryableError(f"not yet {text}")
    return text


@step
async def coded_large(size: int) -> bytes:
    return bytes(size)


@step(max_retries=0)
async def coded_asks(text: str) -> str:
    try:
        raise KeyError(text)
    except KeyError:
        raise RunCancelled("another", "enough")  # noqa: B904 - its context is what is looked at


@step(retry_delay=0)
async def coded_length(text: str, kind: str) -> int:
    if kind == "retried" and not attempts:
        attempts.append(kind)
        raise RetryableError("again")
    if kind == "slow":
        await asyncio.sleep(1.5)
    return len(text)


attempts: list[str] = []


@workflow
async def coded_both(text: str) -> str:
    return await coded_queued(await coded_double(text))


@workflow
async def coded_nap_and(text: str) -> str:
    from pyworkflow import sleep

    first = await coded_double(text)
    await sleep(60)
    return await coded_queued(first)


@workflow
async def coded_fails(text: str) -> str:
    return await coded_break_down(text)


@workflow
async def coded_recovers(text: str) -> str:
    try:
        await coded_break_down(text)
    except ValueError as error:
        return f"{error} / {await coded_second_time(text)}"
    return "no error"


@step
async def coded_counted(text: str) -> str:
    attempts.append(text)
    return text * 2


@workflow
async def coded_once(text: str) -> int:
    return len(await coded_counted(text))


@workflow
async def coded_cancelled_elsewhere(text: str) -> str:
    return await coded_asks(text)


@workflow
async def coded_passes(size: int, kind: str) -> int | str:
    text = "".join(chr(35 + n * n % 50) for n in range(size))
    try:
        if kind == "queued":
            return len(await coded_queued(text)) - 1
        return await coded_length(text, kind)
    except PayloadTooLarge as error:
        return f"limit={error.limit}"


@workflow
async def coded_makes(size: int) -> int:
    return len(await coded_large(size))


@workflow
async def coded_takes(data: str) -> str:
    return await coded_queued(data)


@workflow
async def coded_refused(size: int) -> str:
    try:
        await coded_large(size)
    except PayloadTooLarge as error:
        return f"limit={error.limit}"
    return "stored"


# --- wrapping -----------------------------------------------------------------------------------

CHAINS = ["zlib", "zstd", "aesgcm", "zstd,aesgcm", "aesgcm,zlib", "zlib,zstd,aesgcm,offload"]


@pytest.mark.parametrize("chain", CHAINS)
def test_every_text_comes_back(chain, tmp_path):
    use(
        codecs=chain,
        codec_keys=KEY_1,
        codec_offload_dir=tmp_path,
        codec_compress_threshold=1,
        codec_offload_threshold=64,
    )

    @given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 40))
    def check(text, times):
        payload = encode(text * times)
        stored = wrap(payload)
        json.loads(stored)
        assert unwrapped(stored) == payload
        assert decode(stored) == text * times
        arguments = encode_arguments((text,), {"n": times})
        assert decode_arguments(wrap(arguments)) == ((text,), {"n": times})
        assert digest_arguments(wrap(arguments)) == digest_arguments(arguments)

    check()


def test_what_is_stored_names_codecs_order_and_key():
    use(codecs="zstd,aesgcm", codec_keys=KEY_1, codec_compress_threshold=1)
    stored = json.loads(wrap(encode("a" * 1000)))
    assert stored["$py"] == "codec"
    assert stored["v"] == FORM
    assert stored["c"] == [["zstd", {}], ["aesgcm", {"k": "k1"}]]


@pytest.mark.parametrize("chain", CHAINS)
def test_reading_follows_what_is_stored_and_not_the_settings(chain, tmp_path):
    given = {"codec_keys": KEY_1, "codec_offload_dir": tmp_path, "codec_offload_threshold": 64}
    use(codecs=chain, codec_compress_threshold=1, **given)
    stored = wrap(encode("a" * 1000))
    for others in ("", "zlib", "aesgcm,zstd"):
        use(codecs=others, **given)
        assert decode(stored) == "a" * 1000


def test_user_values_never_look_like_wrapped_payloads():
    use(codecs="zlib")
    for value in (
        {"$py": "codec", "v": 1, "c": [["zlib", {}]], "d": ""},
        '{"$py":"codec"',
        ["$py"],
    ):
        assert not is_wrapped(encode(value))
        assert decode(encode(value)) == value


def test_small_payloads_stay_plain_unless_they_are_encrypted():
    use(codecs="zlib,zstd")
    assert wrap('"short"') == '"short"'
    use(codecs="zlib,aesgcm", codec_keys=KEY_1)
    assert names(wrap('"short"')) == ["aesgcm"]


def test_a_payload_that_does_not_get_smaller_stays_plain():
    use(codecs="zlib,zstd", codec_compress_threshold=1)
    noise = encode(base64.b85encode(os.urandom(60)).decode())
    assert not is_wrapped(wrap(noise))


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_compression_never_makes_a_stored_text_longer(codec):
    use(codecs=codec)
    # Compressed it is shorter, but not by the third that base64 adds.
    text = encode(base64.b85encode(os.urandom(100_000)).decode())
    assert wrap(text) == text


def test_wrapping_twice_changes_nothing():
    use(codecs="aesgcm", codec_keys=KEY_1)
    stored = wrap('"a"')
    assert wrap(stored) == stored


def test_encrypted_texts_of_one_value_differ_and_hide_it():
    use(codecs="aesgcm", codec_keys=KEY_1)
    first, second = wrap(encode(SECRET)), wrap(encode(SECRET))
    assert first != second
    assert SECRET not in first
    assert SECRET.encode() not in base64.b64decode(json.loads(first)["d"])


# --- golden: written by version 0.1.0, readable for ever ---------------------------------------------

GOLDEN = {
    "zlib": (
        '{"$py":"codec","v":1,"c":[["zlib",{}]],"d":"eJyrVsovSkktUrKKVipJTVTSUUouLQCSw58dq6OU'
        'd3ilkpV5LQDEakqC"}'
    ),
    "zstd": (
        '{"$py":"codec","v":1,"c":[["zstd",{}]],"d":"KLUv/WQDAEUBAAQCeyJvcmRlciI6WyJ0ZWEiLCJj'
        'dXAiLF0sIm7DqSI6N30BAMCnShPV6YuY"}'
    ),
    "aesgcm": (
        '{"$py":"codec","v":1,"c":[["aesgcm",{"k":"k1"}]],"d":"D/MOJuVTePCCRvVEDU+S99ZiXN4DFV'
        "Tw7xOa9brVRgryqp1VHnrLmrJEzXMMwatXRTvI4UzQHJZqroPxO/iydG+r8jK3ge2cQxZTtEldSXpEaNhHGY"
        "vQSH6M4yOs2ZJ0LiZ4DxGGPc4ltBRb5e28gwPyIfKEpUK+/2jsv7dNN6GMWLZNgUEBKd3jBtDerCby05+Cve"
        "bNphBTyXR5OJGzS86IQxmInpb2sZ5lO2/wfT1sWSIMtFnQdK2UowkEoDu0DLk6AP6jJQYlQVhJd1lhR1nMC/"
        "zbIkpMUw49APH7nkeBvRmYj/6YEyBMsTtzVZA9HH0jMwHchwjs52I15XktdTYBdMvnOpHnIe19YGYTwSvW0+"
        'DRW3HV03rdvEKJdsU="}'
    ),
    "zstd,aesgcm": (
        '{"$py":"codec","v":1,"c":[["zstd",{}],["aesgcm",{"k":"k1"}]],"d":"ZXPsfRloQXIlJ8suA4'
        "wDdxlyjfOtxD4aqJNNRlcxvO1GaqngV8VZrMXF3aUj1Ynr8yq46FlwzCR5MdGImPmdQ4GWCOemsSt2Fk3Te7"
        'jbwjICAQ=="}'
    ),
}
GOLDEN_OFFLOADED = (
    '{"$py":"codec","v":1,"c":[["offload",{"sha256":"ff57c95dd9dde83f269bbbcc81696635e250'
    '26423b2e016f479c30aca4f85634","size":"259"}]],"d":""}'
)
GOLDEN_VALUE = {"order": ["tea", "cup"] * 20, "né": 7}


@pytest.mark.parametrize("chain", list(GOLDEN))
def test_payloads_of_older_versions_are_read(chain):
    use(codec_keys=KEY_1)
    assert names(GOLDEN[chain]) == chain.split(",")
    assert decode(GOLDEN[chain]) == GOLDEN_VALUE


def test_offloaded_payloads_of_older_versions_are_read(tmp_path):
    text = encode(GOLDEN_VALUE)
    name = json.loads(GOLDEN_OFFLOADED)["c"][0][1]["sha256"]
    (tmp_path / name[:2]).mkdir()
    (tmp_path / name[:2] / name).write_text(text, "utf-8")
    use(codec_offload_dir=tmp_path)
    assert decode(GOLDEN_OFFLOADED) == GOLDEN_VALUE


# --- what cannot be read ----------------------------------------------------------------------------


def unreadable(stored: str) -> PayloadUnreadable:
    with pytest.raises(PayloadUnreadable) as caught:
        decode(stored)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    for key in (KEY_1, KEY_2):
        assert key.partition(":")[2] not in str(caught.value)
    return caught.value


def test_an_unknown_key_is_named_and_no_secret_is():
    use(codecs="aesgcm", codec_keys=KEY_1)
    stored = wrap(encode(SECRET))
    use(codec_keys=KEY_2)
    error = unreadable(stored)
    assert (error.codec, error.key_id) == ("aesgcm", "k1")
    assert "codec_keys" in str(error)


def test_keys_rotate():
    use(codecs="aesgcm", codec_keys=KEY_1)
    old = wrap('"old"')
    use(codecs="aesgcm", codec_keys=f"{KEY_2},{KEY_1}")
    new = wrap('"new"')
    assert '"k":"k2"' in new
    assert [decode(old), decode(new)] == ["old", "new"]
    use(codecs="aesgcm", codec_keys=KEY_2)
    assert decode(new) == "new"
    assert unreadable(old).key_id == "k1"


def test_another_key_of_the_same_id_is_told_from_a_missing_one():
    use(codecs="aesgcm", codec_keys=KEY_1)
    stored = wrap('"a"')
    use(codec_keys=KEY_2.replace("k2", "k1"))
    assert "another key of this id" in str(unreadable(stored))


def test_a_key_file_is_looked_at_again_for_an_unknown_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# the keys\n{KEY_1}\n")
    use(codecs="aesgcm", codec_keys_file=file)
    one = wrap('"one"')
    file.write_text(f"{KEY_2}\n")
    use(codecs="aesgcm", codec_keys_file=file)
    assert unreadable(one).key_id == "k1"
    file.write_text(f"{KEY_2}\n{KEY_1}\n")
    assert decode(one) == "one"


def test_keys_that_are_known_stay_while_the_file_is_rewritten(tmp_path):
    use(codecs="aesgcm", codec_keys=KEY_2)
    unknown = wrap('"b"')
    keys = tmp_path / "keys"
    keys.write_text(KEY_1)
    use(codecs="aesgcm", codec_keys_file=keys)
    stored = wrap('"a"')
    assert decode(stored) == "a"
    keys.write_text("")
    assert unreadable(unknown).key_id == "k2"
    assert decode(stored) == "a"


def test_one_id_with_two_keys_is_refused(tmp_path):
    (tmp_path / "keys").write_text(f"k1:{base64.b64encode(TWO).decode()}\n")
    use(codecs="aesgcm", codec_keys=KEY_1, codec_keys_file=tmp_path / "keys")
    with pytest.raises(ConfigurationError, match="one id has two codec keys: key_id=k1"):
        wrap('"a"')
    (tmp_path / "keys").write_text(KEY_1 + "\n" + KEY_2)
    assert names(wrap('"a"')) == ["aesgcm"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("zlib?compress_threshold=abc", "codec=zlib compress_threshold='abc'"),
        ("zstd?compress_threshold=-5", "codec=zstd compress_threshold='-5'"),
        ("zlib?level=9", "no such options: codec=zlib options=level"),
        ("aesgcm?keys=x", "no such options: codec=aesgcm options=keys"),
    ],
)
def test_wrong_options_of_a_codec_are_told(spec, said):
    use(codecs=spec, codec_keys=KEY_1)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        wrap('"a"')


@pytest.mark.parametrize("where", ["codec", "key", "data", "order"])
def test_what_was_encrypted_cannot_be_exchanged(where):
    use(codecs="zlib,aesgcm", codec_keys=f"{KEY_1},k9:{KEY_1[3:]}", codec_compress_threshold=1)
    tree = json.loads(wrap(encode("a" * 100)))
    match where:
        case "codec":
            tree["c"][0][0] = "zstd"
        case "key":
            tree["c"][1][1]["k"] = "k9"
        case "data":
            data = bytearray(base64.b64decode(tree["d"]))
            data[20] ^= 1
            tree["d"] = base64.b64encode(data).decode()
        case _:
            tree["c"].pop(0)
    assert "damaged" in str(unreadable(json.dumps(tree, separators=(",", ":"))))


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_damaged_compressed_bytes_are_told(codec):
    use(codecs=codec, codec_compress_threshold=1)
    tree = json.loads(wrap(encode("abc" * 100)))
    data = base64.b64decode(tree["d"])
    for damaged in (data[:-3], data + b"more", b"", b"nothing of the kind"):
        tree["d"] = base64.b64encode(damaged).decode()
        assert unreadable(json.dumps(tree, separators=(",", ":"))).codec == codec


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
def test_a_decompression_bomb_is_bounded(codec):
    use(codecs=codec)
    bomb = wrap('"' + "0" * 50_000_000 + '"')
    assert len(bomb) < 200_000
    use(codec_max_size="1 MiB")
    began = time.perf_counter()
    error = unreadable(bomb)
    assert "codec_max_size=1048576" in str(error)
    assert time.perf_counter() - began < 5


def test_a_zstd_frame_that_lies_about_its_size_is_bounded():
    import zstandard

    use(codec_max_size="1 MiB")
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    tree = {"$py": "codec", "v": 1, "c": [["zstd", {}]], "d": base64.b64encode(frame).decode()}
    assert unreadable(json.dumps(tree, separators=(",", ":"))).codec == "zstd"


def test_nested_bombs_are_bounded_at_every_layer():
    use(codec_max_size="1 MiB")
    data = zlib.compress(zlib.compress(bytes(100_000_000)))
    tree = {"$py": "codec", "v": 1, "c": [["zlib", {}]] * 2, "d": base64.b64encode(data).decode()}
    assert "codec_max_size" in str(unreadable(json.dumps(tree, separators=(",", ":"))))


@pytest.mark.parametrize(
    "text",
    [
        '{"$py":"codec"',
        '{"$py":"codec","v":1}',
        '{"$py":"codec","v":1,"c":[],"d":""}',
        '{"$py":"codec","v":1,"c":[["../x",{}]],"d":""}',
        '{"$py":"codec","v":1,"c":[["zlib",{"a":1}]],"d":""}',
        '{"$py":"codec","v":1,"c":[["zlib",{}]],"d":"%"}',
        '{"$py":"codec","v":1,"c":' + "[" * 5000,
    ],
)
def test_a_damaged_form_is_told(text):
    assert "damaged" in str(unreadable(text))


def test_a_newer_form_is_told():
    error = unreadable('{"$py":"codec","v":2,"c":[["zlib",{}]],"d":""}')
    assert "upgrade" in str(error)


def test_a_codec_that_is_not_installed_is_told():
    error = unreadable('{"$py":"codec","v":1,"c":[["rot13",{}]],"d":""}')
    assert error.codec == "rot13"
    assert "install" in str(error)


@pytest.mark.parametrize(("codec", "library"), [("aesgcm", "cryptography"), ("zstd", "zstandard")])
def test_a_missing_library_is_told_with_the_line_that_installs_it(codec, library, monkeypatch):
    use(codecs=codec, codec_keys=KEY_1, codec_compress_threshold=1)
    stored = wrap(encode("a" * 100))
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    use(codecs=codec, codec_keys=KEY_1)
    with pytest.raises(ConfigurationError, match=r"pip install 'pyworkflow-core\[codecs\]'"):
        writer_for(_config.settings())
    assert "pip install 'pyworkflow-core[codecs]'" in str(unreadable(stored))


# --- settings --------------------------------------------------------------------------------------


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PYWORKFLOW_CODECS", "zstd, aesgcm,offload")
    monkeypatch.setenv("PYWORKFLOW_CODEC_KEYS", f"{KEY_1},{KEY_2}")
    monkeypatch.setenv("PYWORKFLOW_CODEC_OFFLOAD_DIR", "big")
    monkeypatch.setenv("PYWORKFLOW_CODEC_OFFLOAD_THRESHOLD", "1 KiB")
    use()
    settings = _config.settings()
    assert settings.codecs == ("zstd", "aesgcm", "offload")
    assert settings.codec_offload_dir == tmp_path / "big"
    assert names(wrap(encode(base64.b85encode(os.urandom(3000)).decode())))[-1] == "offload"


def test_settings_come_from_the_project(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pyworkflow]\ncodecs = ["zlib"]\ncodec_keys_file = "keys"\ncodec_max_size = "3 MiB"\n'
    )
    use()
    settings = _config.settings()
    assert settings.codecs == ("zlib",)
    assert settings.codec_keys_file == tmp_path / "keys"
    assert settings.codec_max_size == 3 * 1024 * 1024


def test_keys_are_shown_nowhere(monkeypatch):
    secret = KEY_1.partition(":")[2]
    use(codec_keys=KEY_1)
    settings = _config.settings()
    shown = [repr(settings), str(settings.codec_keys), repr(settings.codec_keys)]
    with pytest.raises(ConfigurationError) as caught:
        _config.configure(codec_keys=KEY_2)
    shown.append(str(caught.value))
    for wrong in (f"{KEY_1},{KEY_1}", f":{secret}", f"k1:{secret}x", f"a b:{secret}", 7):
        with pytest.raises(ConfigurationError) as caught:
            use(codec_keys=wrong)
        shown.append(str(caught.value))
    assert not [text for text in shown if secret in text or KEY_2[3:] in text]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"codecs": "aesgcm"}, "PYWORKFLOW_CODEC_KEYS"),
        ({"codecs": "offload"}, "PYWORKFLOW_CODEC_OFFLOAD_DIR"),
        ({"codecs": "aesgcm", "codec_keys_file": "/nowhere/keys"}, "codec_keys_file"),
        ({"codecs": "rot13"}, "codec=rot13"),
        ({"codecs": "ROT 13"}, "no proper name"),
    ],
)
def test_what_is_missing_for_writing_is_told_before_anything_runs(given, message):
    use(**given)
    with pytest.raises(ConfigurationError, match=message):
        writer_for(_config.settings())


@pytest.mark.parametrize("wrong", ["offload,zlib", "zlib,zlib"])
def test_lists_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="setting=codecs"):
        use(codecs=wrong)


def test_without_codecs_there_is_no_writer():
    assert writer_for(_config.settings()) is None


def test_the_codecs_are_listed_as_plugins():
    found = {info.name: info.kinds for info in _plugins.list_plugins()}
    assert {found[name] for name in ("zlib", "zstd", "aesgcm", "offload")} == {("codec",)}


# --- codecs of others ---------------------------------------------------------------------------------


class Reverse:
    """A codec of somebody's."""

    secret = False
    blocking = True

    def __init__(self, options: Any) -> None:
        self.options = options

    def encode(self, data: bytes, context: bytes) -> Any:
        return data[::-1], {"by": "reverse"}

    def decode(self, data: bytes, context: bytes, params: Any) -> bytes:
        assert params == {"by": "reverse"}
        if self.options.get("broken"):
            raise RuntimeError(f"broken by {data!r}")
        return data[::-1]


class Plugin:
    @hookimpl
    def pyworkflow_make_codec(self, name: str, options: Any) -> Codec | None:
        return Reverse(options) if name == "reverse" else None


def test_a_registered_plugin_makes_codecs():
    _plugins.register(Plugin())
    use(codecs="reverse?depth=3,aesgcm", codec_keys=KEY_1)
    stored = wrap(encode(SECRET))
    assert names(stored) == ["reverse", "aesgcm"]
    assert decode(stored) == SECRET
    codec: Any = _chain._reader.codec("reverse")
    assert codec.options["depth"] == "3"
    assert "keys" not in codec.options


def test_a_codec_that_blocks_is_called_beside_the_loop():
    threads: set[int] = set()

    class Watched(Reverse):
        secret = True

        def encode(self, data: bytes, context: bytes) -> Any:
            threads.add(threading.get_ident())
            return super().encode(data, context)

        def decode(self, data: bytes, context: bytes, params: Any) -> bytes:
            threads.add(threading.get_ident())
            return super().decode(data, context, params)

    make = hookimpl(lambda name, options: Watched(options) if name == "watched" else None)
    _plugins.register(SimpleNamespace(pyworkflow_make_codec=make))
    given = use(codecs="watched")

    async def main() -> None:
        async with bench(**given) as b:
            attempts.clear()
            run_id = await b.start(coded_recovers, SECRET)
            assert SECRET in await b.result(run_id)
            asleep = await b.start(coded_nap_and, SECRET)
            await b.asleep(asleep)
            await b.restart()
            await b.pass_time("2m")
            assert await b.result(asleep) == SECRET * 2 + "!"
            failed = await b.start(coded_fails, SECRET)
            with pytest.raises(ValueError, match="cannot do"):
                await b.result(failed)

    asyncio.run(main())
    assert threads
    assert threading.get_ident() not in threads


def test_an_installed_plugin_is_found_by_the_name_of_its_entry_point(monkeypatch):
    real = _plugins._discover

    def discover() -> Any:
        found = _plugins._Found("reverse", "somebody", "1", Plugin)
        return {**real(), "reverse": [found]}

    monkeypatch.setattr(_plugins, "_discover", discover)
    use(codecs="reverse")
    assert decode(wrap('"a"')) == "a"


def test_a_broken_codec_tells_its_name_and_none_of_the_data():
    _plugins.register(Plugin())
    use(codecs="reverse?broken=1")
    stored = wrap(encode(SECRET))
    error = unreadable(stored)
    assert error.codec == "reverse"
    assert "RuntimeError" in str(error)
    assert "sphinx" not in str(error)

    class Worse(Reverse):
        def encode(self, data: bytes, context: bytes) -> Any:
            raise ValueError(f"cannot take {data!r}")

    plugin = SimpleNamespace(
        pyworkflow_make_codec=hookimpl(
            lambda name, options: Worse(options) if name == "worse" else None
        )
    )
    _plugins.register(plugin)
    use(codecs="worse")
    with pytest.raises(SerializationError, match="codec=worse") as caught:
        wrap(encode(SECRET))
    assert "sphinx" not in str(caught.value)


# --- runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_an_encrypted_run_leaves_nothing_readable(kind, tmp_path):
    given = use(codecs="zstd,aesgcm", codec_keys=KEY_1, codec_compress_threshold=10)

    async def main() -> None:
        store = MemoryStorageBackend() if kind == "memory" else FileStorageBackend(tmp_path / "s")
        async with bench(store, **given) as b:
            done = await b.start(coded_both, SECRET)
            assert await b.result(done) == SECRET * 2 + "!"
            failed = await b.start(coded_fails, SECRET)
            with pytest.raises(ValueError, match="cannot do the secret"):
                await b.result(failed)
            attempts.clear()
            again = await b.start(coded_recovers, SECRET)
            assert await b.result(again) == f"cannot do {SECRET} / {SECRET}"
            for run_id in (done, failed, again):
                assert "sphinx" not in await raw(b, run_id)
                for event in await b.events(run_id):
                    validate_event(event)
            # Who has the key sees it all.
            run = await b.ops.get_run(failed)
            assert run.error is not None
            assert run.error.message == f"cannot do {SECRET}"
            assert run.args == {"text": SECRET}
            shown = await b.ops.get_events(failed, 0, None)
            assert "sphinx" in json.dumps([e.data for e in shown])
        await store.close()

    asyncio.run(main())
    if kind == "file":
        for path in (tmp_path / "s").rglob("*"):
            assert not path.is_file() or b"sphinx" not in path.read_bytes()


def test_an_error_that_quotes_is_hidden_whatever_its_type():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_cancelled_elsewhere, SECRET)
            with pytest.raises(RunCancelled, match="enough") as caught:
                await b.result(run_id)
            assert caught.value.run_id == "another"
            assert "sphinx" not in await raw(b, run_id)

    asyncio.run(main())


def test_compression_alone_leaves_errors_readable():
    given = use(codecs="zlib", codec_compress_threshold=1)

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_fails, "x" * 500)
            with pytest.raises(ValueError, match="cannot do"):
                await b.result(run_id)
            run = await b.get(run_id)
            assert run.error is not None
            assert run.error.message.startswith("cannot do x")
            assert is_wrapped(run.args_text)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_f44_a_missing_key_stalls_the_turn_and_heals(kind, tmp_path):
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        store = MemoryStorageBackend() if kind == "memory" else FileStorageBackend(tmp_path / "s")
        async with bench(store, **given) as b:
            run_id = await b.start(coded_nap_and, SECRET)
            await b.asleep(run_id)
            await become(b, codecs="aesgcm", codec_keys=KEY_2)
            await b.pass_time("2m")
            run = await b.until(run_id, "stalled")
            assert run.stalled is not None
            for word in ("codec=aesgcm", "key_id=k1", "codec_keys"):
                assert word in run.stalled
            before = [e for e in await b.events(run_id) if e.klass != "O"]
            # A client without the key: the run as it is stored, no crash; the listing too.
            seen = await b.ops.get_run(run_id)
            assert is_wrapped(seen.args_text)
            assert "encoded payload (wrapped by aesgcm key_id=k1" in str(seen.args)
            assert len((await b.ops.list_runs(None, None, 10, None)).items) == 1
            await become(b, codecs="aesgcm", codec_keys=f"{KEY_2},{KEY_1}")
            await b.pass_time("1m")
            assert await b.result(run_id) == SECRET * 2 + "!"
            after = [e for e in await b.events(run_id) if e.klass != "O"]
            assert after[: len(before)] == before
            assert len(await b.events(run_id, "workflow.stalled")) == 1
            use(codec_keys=KEY_1)
            with pytest.raises(PayloadUnreadable, match="key_id=k2"):
                await b.ops.result(run_id, 0)
        await store.close()

    asyncio.run(main())


def test_f44_a_dispatched_step_without_its_key_is_left_to_others():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(work=False, **given) as b:
            worker = await b.work()
            # Take the turn away from this worker once the step is owed.
            worker._steps.begin = lambda claim: worker.spawn(worker.storage.release(claim.ref))  # type: ignore[method-assign] # for this test
            run_id = await b.start(coded_takes, SECRET)
            await b.has(run_id, "step.scheduled")
            await become(b, codecs="aesgcm", codec_keys=KEY_2)
            await b.has(run_id, "log.error")
            for _ in range(6):  # more often than a step may take its worker down

                async def given_back() -> bool:
                    items = await b.items(run_id)
                    item = next(i for n, i in items.items() if n.startswith("step:"))
                    return item.lease is None and item.due_at > await b.storage.now()

                await eventually(given_back)
                await b.pass_time(2)
                assert b.worker is not None
                b.worker.wake()
            lines = await b.events(run_id, "log.error")
            assert len(lines) == 1
            assert "key_id=k1" in str(lines[0].data["message"])
            assert await b.events(run_id, "step.failed") == []
            await become(b, codecs="aesgcm", codec_keys=f"{KEY_2},{KEY_1}")
            await b.pass_time(2)
            assert await b.result(run_id) == SECRET + "!"
            ended = (await b.events(run_id, "step.completed"))[0]
            assert ended.data["attempt"] == 1

    asyncio.run(main())


def test_a_missing_key_of_an_error_stalls_the_run():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            attempts.clear()
            run_id = await b.start(coded_recovers, SECRET)
            assert SECRET in await b.result(run_id)
            history = await History.fetch(run_id, b.storage)
            use(codec_keys=KEY_1)
            assert replay(history).ok
            use(codec_keys=KEY_2)
            assert "key_id=k1" in str(replay(history).mismatch)
            failed = next(e for e in history.events if e.type == "step.failed")
            with pytest.raises(PayloadUnreadable):
                decode_error(failed.data["error"])  # type: ignore[arg-type] # an object

    asyncio.run(main())


def test_runs_of_all_settings_live_in_one_store(tmp_path):
    async def main() -> None:
        async with bench(**use()) as b:
            ids = [await b.start(coded_nap_and, f"run {at}") for at in range(2)]
            await b.asleep(ids[0])
            await b.asleep(ids[1])
            for at, given in enumerate(
                [
                    {"codecs": "zlib", "codec_compress_threshold": 1},
                    {"codecs": "zstd,aesgcm", "codec_keys": KEY_1, "codec_compress_threshold": 1},
                    {
                        "codecs": "aesgcm,offload",
                        "codec_keys": f"{KEY_2},{KEY_1}",
                        "codec_offload_dir": tmp_path,
                        "codec_offload_threshold": 1,
                    },
                ]
            ):
                await become(b, **given)
                ids.append(await b.start(coded_nap_and, f"run {at + 2}"))
                await b.asleep(ids[-1])
            await become(b, codec_keys=f"{KEY_1},{KEY_2}", codec_offload_dir=tmp_path)
            await b.pass_time("2m")
            for at, run_id in enumerate(ids):
                assert await b.result(run_id) == f"run {at}" * 2 + "!"

    asyncio.run(main())


def test_the_same_start_is_known_whatever_its_text_looks_like():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            first = await b.start(coded_both, SECRET, key="order-1")
            assert await b.start(coded_both, SECRET, key="order-1") == first
            await become(b, codecs="zlib,aesgcm", codec_keys=f"{KEY_2},{KEY_1}")
            assert await b.start(coded_both, SECRET, key="order-1") == first
            with pytest.raises(IdempotencyConflict):
                await b.start(coded_both, "something else", key="order-1")
            use(codec_keys=KEY_2)
            with pytest.raises(PayloadUnreadable, match="key_id=k1"):
                await b.start(coded_both, SECRET, key="order-1")

    asyncio.run(main())


def test_digests_of_encrypted_arguments_are_keyed():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            found = []
            for _ in range(2):
                run_id = await b.start(coded_takes, "1234")
                assert await b.result(run_id) == "1234!"
                found.append((await b.events(run_id, "step.completed"))[0].data["digest"])
                history = await History.fetch(run_id, b.storage)
                use(codec_keys=f"{KEY_2},{KEY_1}")
                assert replay(history).ok
            plain = digest_arguments(encode_arguments(("1234",), {}))
            assert len({plain, *found}) == 3

    asyncio.run(main())


def test_changes_that_are_sent_again_send_the_same_texts(monkeypatch):
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            sent: list[Any] = []
            real = b.storage.commit

            async def flaky(changes: Any) -> Any:
                sent.extend(changes)
                answers = await real(changes)
                if len(sent) % 2:
                    raise StorageUnavailable("the answer got lost")
                return answers

            monkeypatch.setattr(b.storage, "commit", flaky)
            assert await b.run(coded_both, SECRET) == SECRET * 2 + "!"
            by_key: dict[str, Any] = {}
            for change in sent:
                assert by_key.setdefault(change.key, change) is change

    asyncio.run(main())


# --- offload ----------------------------------------------------------------------------------------------


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_result_of_50_mib_works_with_offload(tmp_path):
    given = use(codecs="offload", codec_offload_dir=tmp_path)
    size = 50 * 1024 * 1024

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_makes, size)
            assert await b.result(run_id, 60) == size
            assert len(await raw(b, run_id)) < 10_000
            await become(b, codec_offload_dir=tmp_path)
            assert replay(await History.fetch(run_id, b.storage)).ok

    asyncio.run(main())
    assert len(files(tmp_path)) == 1


def test_large_arguments_work_with_offload(tmp_path):
    given = use(codecs="offload", codec_offload_dir=tmp_path)

    async def main() -> None:
        async with bench(**given) as b:
            data = "x" * 5_000_000
            assert await b.run(coded_takes, data) == data + "!"

    asyncio.run(main())


def test_the_limit_counts_what_is_stored():
    given = use(codecs="zlib", max_payload=10_000)

    async def main() -> None:
        async with bench(**given) as b:
            assert await b.run(coded_refused, 100_000) == "stored"
            assert await b.run(coded_takes, "y" * 9_000) == "y" * 9_000 + "!"
            await become(b, max_payload=10_000)
            assert await b.run(coded_refused, 100_000) == "limit=10000"
            await become(b, codecs="aesgcm", codec_keys=KEY_1, max_payload=10_000)
            assert await b.run(coded_refused, 100_000) == "limit=10000"
            with pytest.raises(PayloadTooLarge):
                await b.start(coded_takes, "y" * 20_000)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["quick", "slow", "retried", "queued"])
def test_arguments_count_before_codecs_however_their_step_goes(kind):
    given = use(codecs="aesgcm", codec_keys=KEY_1, max_payload=40_000)

    async def main() -> None:
        attempts.clear()
        async with bench(**given) as b:
            if kind != "queued":  # its result counts as it is stored
                assert await b.run(coded_passes, 38_000, kind) == 38_000
            attempts.clear()
            assert await b.run(coded_passes, 40_001, kind) == "limit=40000"

    asyncio.run(main())


def test_arguments_that_codecs_make_too_long_for_the_store_are_refused_at_the_call():
    class Small(MemoryStorageBackend):
        def info(self) -> StorageInfo:
            return replace_fields(super().info(), max_payload=40_000)

    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(Small(), **given) as b:
            assert await b.run(coded_passes, 38_000, "quick") == "limit=28976"

    asyncio.run(main())


def test_a_value_beyond_what_could_be_read_back_is_refused(tmp_path):
    given = use(codecs="zlib,offload", codec_offload_dir=tmp_path, codec_max_size="1 MiB")

    async def main() -> None:
        async with bench(**given) as b:
            assert await b.run(coded_refused, 2_000_000) == "limit=1048576"

    asyncio.run(main())


def test_a_missing_file_stalls_and_heals(tmp_path):
    shared = tmp_path / "shared"
    on = {"codecs": "offload", "codec_offload_dir": shared, "codec_offload_threshold": 20}

    async def main() -> None:
        async with bench(**use(**on)) as b:
            run_id = await b.start(coded_nap_and, SECRET)
            await b.asleep(run_id)
            await b.rest()
            shared.rename(tmp_path / "away")
            await b.work()
            await b.pass_time("2m")
            run = await b.until(run_id, "stalled")
            assert "codec=offload" in str(run.stalled)
            (tmp_path / "away").rename(shared)
            await b.pass_time("1m")
            assert await b.result(run_id) == SECRET * 2 + "!"

    asyncio.run(main())


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_files_are_checked_when_they_are_read(damage, tmp_path):
    use(codecs="offload", codec_offload_dir=tmp_path, codec_offload_threshold=1)
    stored = wrap(encode("abc"))
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole.swapcase() if damage is None else damage)
    assert "is damaged" in str(unreadable(stored))
    assert wrap(encode("abc")) == stored  # writing again repairs it
    assert decode(stored) == "abc"


@pytest.mark.parametrize(
    "params", [{"sha256": "../../etc/passwd", "size": "9"}, {"sha256": "0" * 64, "size": "-1"}, {}]
)
def test_a_reference_leads_nowhere_else(params, tmp_path):
    use(codec_offload_dir=tmp_path)
    tree = {"$py": "codec", "v": 1, "c": [["offload", params]], "d": ""}
    assert "reference is damaged" in str(unreadable(json.dumps(tree, separators=(",", ":"))))


def test_a_directory_that_is_out_of_order_fails_no_step(tmp_path, monkeypatch):
    given = use(codecs="offload", codec_offload_dir=tmp_path / "d", codec_offload_threshold=20)
    times = [0]
    real = OffloadCodec.encode

    def flaky(self: Any, data: bytes, context: bytes) -> Any:
        times[0] += 1
        if times[0] in (2, 3, 5):
            raise StorageUnavailable("the directory is away")
        return real(self, data, context)

    monkeypatch.setattr(OffloadCodec, "encode", flaky)

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_both, SECRET)
            assert await b.result(run_id) == SECRET * 2 + "!"
            assert await b.events(run_id, "step.failed") == []
            assert await b.events(run_id, "step.retrying") == []

    asyncio.run(main())
    assert times[0] > 5


@pytest.mark.parametrize("trouble", [StorageFull, StorageUnavailable])
def test_what_a_full_directory_cannot_take_waits_beyond_its_lease(trouble, tmp_path, monkeypatch):
    given = use(codecs="offload", codec_offload_dir=tmp_path / "d", codec_offload_threshold=20)
    real = OffloadCodec.encode
    lease = 0.6
    first: list[float] = []

    def full(self: Any, data: bytes, context: bytes) -> Any:
        if SECRET.encode() * 2 in data:  # what the first step returns
            first.append(time.monotonic())
            if first[-1] - first[0] < 3 * lease:
                raise trouble("the directory is full")
        return real(self, data, context)

    monkeypatch.setattr(OffloadCodec, "encode", full)

    async def main() -> None:
        async with bench(lease=lease, **given) as b:
            attempts.clear()
            run_id = await b.start(coded_once, SECRET)
            assert await b.result(run_id) == len(SECRET) * 2
            assert attempts == [SECRET]
            assert await b.events(run_id, "step.failed") == []

    asyncio.run(main())
    assert first[-1] - first[0] > 2 * lease


def test_a_result_that_a_codec_cannot_take_fails_its_step_once_and_says_why():
    class Picky(Reverse):
        def encode(self, data: bytes, context: bytes) -> Any:
            if b"!" in data:
                raise ValueError("no")
            return super().encode(data, context)

    _plugins.register(
        SimpleNamespace(
            pyworkflow_make_codec=hookimpl(
                lambda name, options: Picky(options) if name == "picky" else None
            )
        )
    )
    given = use(codecs="picky")

    async def main() -> None:
        async with bench(lease=0.6, **given) as b:
            run_id = await b.start(coded_both, "text")
            with pytest.raises(SerializationError, match="codec=picky error=ValueError"):
                await b.result(run_id)
            (failed,) = await b.events(run_id, "step.failed")
            assert failed.data["attempt"] == 1

    asyncio.run(main())


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    use(codecs="offload", codec_offload_dir=tmp_path / "file", codec_offload_threshold=1)
    with pytest.raises(StorageUnavailable, match="directory="):
        wrap('"a"')


def test_sweeping_removes_old_files_that_no_run_refers_to(tmp_path):
    given = use(codecs="aesgcm,offload", codec_keys=KEY_1, codec_offload_dir=tmp_path)
    given["codec_offload_threshold"] = 20
    use(
        codecs="aesgcm,offload",
        codec_keys=KEY_1,
        codec_offload_dir=tmp_path,
        codec_offload_threshold=20,
    )

    async def main() -> None:
        async with bench(**given) as b:
            with pytest.raises(StorageError, match="no runs"):
                await sweep_offloaded(b.storage, directory=tmp_path)
            asleep = await b.start(coded_nap_and, SECRET)
            await b.asleep(asleep)
            failed = await b.start(coded_fails, SECRET)
            with pytest.raises(ValueError, match="cannot"):
                await b.result(failed)
            used = files(tmp_path)
            orphan = json.loads(wrap('"orphan"'))["c"][1][1]["sha256"]
            wrap('"young"')
            old = time.time() - 200_000
            for path in [*used, tmp_path / orphan[:2] / orphan]:
                os.utime(path, (old, old))
            removed = await sweep_offloaded(b.storage, directory=tmp_path)
            assert [path.name for path in removed] == [orphan]
            assert set(used) <= set(files(tmp_path))
            assert len(files(tmp_path)) == len(used) + 1
            await b.pass_time("2m")
            assert await b.result(asleep) == SECRET * 2 + "!"
            with pytest.raises(ValueError, match="older_than"):
                await sweep_offloaded(b.storage, directory=tmp_path, older_than=timedelta(0))

    asyncio.run(main())


def test_a_file_that_is_written_again_while_it_is_swept_stays(tmp_path, monkeypatch):
    use(codecs="offload", codec_offload_dir=tmp_path, codec_offload_threshold=1)
    stored = wrap('"again"')
    (file,) = files(tmp_path)
    os.utime(file, (0, 0))
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix != ".part":
            monkeypatch.setattr(Path, "unlink", real)
            assert wrap('"again"') == stored  # a worker offloads it at this moment
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    asyncio.run(swept(tmp_path))
    assert Path.unlink is real
    assert files(tmp_path) == [file]
    assert decode(stored) == "again"


def test_v05_a_file_is_read_while_a_sweep_has_it_out_of_the_way(tmp_path, monkeypatch):
    use(codecs="offload", codec_offload_dir=tmp_path, codec_offload_threshold=1)
    stored = wrap('"again"')
    (file,) = files(tmp_path)
    os.utime(file, (0, 0))
    remove, put_back = _offload._remove, _offload._put_back
    put = []

    def writes_and_removes(*args: Any) -> list[Path]:
        assert wrap('"again"') == stored  # a worker offloads it after the sweep saw its age
        return remove(*args)

    def reads_and_puts_back(gone: Path) -> None:
        assert not file.exists()
        assert decode(stored) == "again"
        put_back(gone)
        put.append(gone)

    monkeypatch.setattr(_offload, "_remove", writes_and_removes)
    monkeypatch.setattr(_offload, "_put_back", reads_and_puts_back)
    asyncio.run(swept(tmp_path))
    assert len(put) == 1
    assert decode(stored) == "again"


def test_v05_a_file_that_a_sweep_puts_back_before_it_is_found_aside_is_read(tmp_path, monkeypatch):
    use(codecs="offload", codec_offload_dir=tmp_path, codec_offload_threshold=1)
    stored = wrap('"again"')
    (file,) = files(tmp_path)
    gone = file.with_name(f"{file.name}.00ff.gone")
    file.rename(gone)
    glob = Path.glob

    def puts_back_and_globs(path: Path, pattern: str) -> Iterator[Path]:
        if gone.exists():
            _offload._put_back(gone)
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", puts_back_and_globs)
    assert decode(stored) == "again"
    assert file.exists()


def test_a_file_that_a_killed_sweep_took_away_comes_back(tmp_path):
    use(codecs="offload", codec_offload_dir=tmp_path, codec_offload_threshold=1)
    stored = wrap('"again"')
    (file,) = files(tmp_path)
    file.rename(file.with_name(f"{file.name}.00ff.gone"))
    asyncio.run(swept(tmp_path))
    assert files(tmp_path) == [file]
    assert decode(stored) == "again"


async def swept(directory: Path) -> list[Path]:
    async with MemoryStorageBackend() as store:
        return await sweep_offloaded(store, directory=directory, allow_empty=True)


# --- the command line ----------------------------------------------------------------------------------------


def test_the_command_line_shows_what_it_can(tmp_path, monkeypatch, capsys):
    pytest.importorskip("click")
    from pyworkflow.cli._root import execute

    given = use(codecs="zstd,aesgcm", codec_keys=KEY_1)
    url = f"file:{tmp_path / 'store'}"

    async def main() -> str:
        store = FileStorageBackend(tmp_path / "store")
        async with bench(store, **given) as b:
            run_id = await b.start(coded_both, SECRET)
            await b.result(run_id)
        await store.close()
        return run_id

    run_id = asyncio.run(main())

    def run(*args: str, key: str) -> str:
        use()
        monkeypatch.setenv("PYWORKFLOW_CODEC_KEYS", key)
        _config._reset_for_tests()
        capsys.readouterr()
        assert execute([*args, "--storage", url]) == 0
        return str(capsys.readouterr().out)

    assert SECRET in run("runs", "show", run_id, key=KEY_1)
    assert SECRET in run("runs", "events", run_id, key=KEY_1)
    shown = run("runs", "show", run_id, key=KEY_2)
    assert "wrapped by aesgcm key_id=k1" in shown
    assert SECRET not in shown + run("runs", "events", run_id, key=KEY_2)
    assert run_id in run("runs", "list", key=KEY_2)


def test_without_the_package_the_serializer_tells_how_to_read(monkeypatch):
    monkeypatch.setattr(_serialization, "_unwrap", None)
    with pytest.raises(SerializationError, match="_codecs"):
        decode(GOLDEN["zlib"])


def test_a_client_that_only_reads_needs_no_key_to_write_with():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            done = await b.start(coded_both, SECRET)
            await b.result(done)
            open_ = await b.start(coded_nap_and, SECRET)
            await b.asleep(open_)
            await b.rest()
            given_here = use(codecs="aesgcm")
            object.__setattr__(b.settings, "codec_keys", given_here["codec_keys"])
            page = await b.ops.list_runs(None, None, 10, None)
            assert len(page.items) == 2
            with pytest.raises(PayloadUnreadable):
                await b.ops.result(done, 0)
            await b.ops.cancel(open_, "not needed")
            with pytest.raises(ConfigurationError, match="PYWORKFLOW_CODEC_KEYS"):
                await b.start(coded_both, SECRET)

    asyncio.run(main())


def test_an_error_is_recorded_however_small_payloads_must_be():
    given = use(codecs="aesgcm", codec_keys=KEY_1, max_payload=300)

    async def main() -> None:
        async with bench(**given) as b:
            with pytest.raises(ValueError, match="cannot do"):
                await b.run(coded_fails, SECRET)

    asyncio.run(main())


def test_a_cancelled_run_tells_its_reason_without_a_key():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_nap_and, SECRET)
            await b.asleep(run_id)
            await b.ops.cancel(run_id, "not needed")
            run = await b.until(run_id, "cancelled")
            assert run.error is not None
            assert run.error.message == "not needed"

    asyncio.run(main())


def test_keys_compare_by_value():
    assert CodecKeys([("a", ONE)]) == CodecKeys([("a", ONE)]) != CodecKeys([("a", TWO)])
    assert hash(CodecKeys([("a", ONE)])) == hash(CodecKeys([("a", ONE)]))


def test_a_result_is_shown_when_the_arguments_cannot_be():
    given = use(codecs="aesgcm", codec_keys=KEY_1)

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_nap_and, SECRET)
            await b.asleep(run_id)
            await become(b, codec_keys=KEY_1)
            await b.pass_time("2m")
            await b.result(run_id)
            await b.rest()
            use()
            run = await b.ops.get_run(run_id)
            assert is_wrapped(run.args_text)
            assert run.result == SECRET * 2 + "!"

    asyncio.run(main())


def test_a_long_encrypted_history_is_read_beside_the_loop(monkeypatch):
    given = use(codecs="aesgcm", codec_keys=KEY_1)
    seen: set[int] = set()

    async def main() -> None:
        async with bench(**given) as b:
            run_id = await b.start(coded_nap_and, SECRET)
            await b.asleep(run_id)
            real = _chain.unwrapped

            def noted(text: str) -> str:
                seen.add(threading.get_ident())
                return real(text)

            monkeypatch.setattr(_chain, "unwrapped", noted)
            shown = await b.ops.get_events(run_id, 0, None)
            assert SECRET in json.dumps([event.data for event in shown])

    asyncio.run(main())
    assert len(seen) == 1
    assert threading.get_ident() not in seen

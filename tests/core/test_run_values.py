"""Values of a stored run: arguments and result as they were, read from any store."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest

from pyworkflow import Client, workflow
from pyworkflow._run_values import arguments_of, result_of
from pyworkflow.errors import SerializationError
from pyworkflow.runs import EncodedPayload, Run
from pyworkflow.storage.file import FileStorageBackend
from pyworkflow.testing import start_local


@dataclass
class Parcel:
    code: str
    grams: int


@workflow()
async def rv_pack(parcel: Parcel, *more: int, note: str = "") -> Parcel:
    return Parcel(parcel.code + note, parcel.grams + sum(more))


def test_v10_a_store_shows_values_and_keeps_the_text(tmp_path):
    async def main() -> None:
        storage = FileStorageBackend(tmp_path / "store")
        run_id = await start_local(rv_pack, Parcel("a", 1), 2, 3, note="!", storage=storage)
        run = await storage.get_run(run_id)
        assert run is not None
        assert run.status == "completed"
        assert run.result == Parcel("a!", 6)
        assert run.args == {"parcel": Parcel("a", 1), "more": (2, 3), "note": "!"}
        assert json.loads(run.result_text)["v"] == {"code": "a!", "grams": 6}
        assert json.loads(run.args_text)["kwargs"] == {"note": "!"}
        (listed,) = (await storage.list_runs(_query())).items
        assert listed.result == run.result
        assert listed == run == pickle.loads(pickle.dumps(run)) == copy.deepcopy(run)
        assert pickle.loads(pickle.dumps(run)).result == Parcel("a!", 6)
        with pytest.raises(dataclasses.FrozenInstanceError):
            run.result_text = "1"  # type: ignore[misc]
        assert run.result is not run.result  # the caller's own value, not a shared one
        await storage.close()

    asyncio.run(main())


def test_v10_a_client_and_its_store_show_the_same_values():
    async def main() -> None:
        async with Client(storage="memory://") as client:
            run_id = await client.start(rv_pack, Parcel("a", 1))
            await client.result(run_id)
            run = await client.get_run(run_id)
            assert (run.args, run.result) == ({"parcel": Parcel("a", 1)}, Parcel("a", 1))
            (listed,) = (await client.list_runs()).items
            assert listed == run

    asyncio.run(main())


def _query() -> Any:
    from pyworkflow.spi import RunQuery

    return RunQuery()


def test_v10_nothing_is_decoded_unless_it_is_read(monkeypatch):
    import pyworkflow._run_values as values

    run = _run(args_text='{"args":[1]}', result_text="[2]")

    def no(*_: object) -> object:
        raise AssertionError("decoded")

    monkeypatch.setattr(values, "arguments_of", no)
    monkeypatch.setattr(values, "result_of", no)
    assert dataclasses.replace(run, priority=1) != run
    assert run == pickle.loads(pickle.dumps(run))
    assert "[2]" in repr(run)
    with pytest.raises(AssertionError, match="decoded"):
        _ = run.result


def test_v10_a_run_without_a_result_has_none():
    assert _run().result is None
    assert _run().args is None
    assert _run(result_text="null").result is None


def test_v10_an_encoded_payload_says_so():
    text = '{"$py":"codec","c":[["aesgcm",{"k":"k1"}]],"d":"AAAA"}'
    run = _run(args_text=text, result_text=text)
    for value in (run.args, run.result):
        assert isinstance(value, EncodedPayload)
        assert value.text == text
        assert str(value).startswith("encoded payload (")
        assert "AAAA" not in repr(value)


def test_v10_arguments_by_position_where_the_workflow_is_unknown_or_changed():
    assert arguments_of("rv_unknown", '{"args":[1],"kwargs":{"b":2}}') == {"0": 1, "b": 2}
    assert arguments_of("rv_pack", '{"args":[],"kwargs":{"b":2}}') == {"b": 2}


def test_v10_what_is_not_here_is_named_and_the_text_remains():
    text = '{"$py":"dataclass","t":"rv_nowhere:Thing","v":{"a":1}}'
    run = _run(result_text=text)
    with pytest.raises(SerializationError, match="rv_nowhere:Thing"):
        _ = run.result
    assert run.result_text == text
    for damaged in ("[1]", "1", '{"args":5}', "x\x00"):
        with pytest.raises(SerializationError):
            arguments_of("rv_pack", damaged)
    with pytest.raises(SerializationError):
        result_of("rv_unknown", "{")


def _run(**fields: Any) -> Run:
    from datetime import UTC, datetime

    from pyworkflow.runs import RunStatus

    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Run(
        run_id="run_1",
        workflow="rv_unknown",
        version="1",
        status=RunStatus.COMPLETED,
        created_at=at,
        updated_at=at,
        **fields,
    )

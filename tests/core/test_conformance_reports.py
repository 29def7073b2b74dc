"""What the suite says: of failures, of times, of what a URL cannot prove."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import Capabilities
from pyworkflow_conformance import StorageConformance, run_conformance, summary
from pyworkflow_conformance._formats import FORMATS, matrix
from pyworkflow_conformance._levels import PROOFS, checks
from pyworkflow_conformance._report import Result, Status, judge
from pyworkflow_conformance._run import chosen_by
from pyworkflow_conformance._told import differences
from tests.conformance.broken import stores
from tests.core.test_conformance_cli import call, results_of

ALL = Capabilities(**dict.fromkeys(PROOFS, True))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failing(kind, name):
    """The failure of one check on a broken store."""
    made = {}

    class Suite(StorageConformance):
        capabilities = MemoryStorageBackend().info().capabilities

        async def make(self, namespace):
            return made.setdefault(namespace, kind(namespace=namespace)).clone()

    with pytest.raises(AssertionError) as caught:
        getattr(Suite(), name)()
    return caught.value


class Hangs(stores.Broken):
    """A lock was left behind: one call never ends."""

    async def get_run(self, run_id):
        await asyncio.get_running_loop().create_future()


class OtherContract(stores.Broken):
    """Was written for a contract of the past."""

    def info(self):
        return replace(super().info(), contract_version=1)


def test_e01_a_failure_begins_with_what_the_check_guards():
    failure = failing(stores.OutOfOrder, "test_ORD_05_read_after_excludes")
    first, _, rest = str(failure).partition("\n\n")
    assert first.startswith("ORD-05")
    assert "Usual cause:" in first
    assert rest


def test_e02_values_that_differ_are_named_by_their_paths():
    found = {"lease": {"until": 7, "owner": "a"}, "same": ["x"] * 1000}
    expected = {"lease": {"until": 8, "owner": "a"}, "same": ["x"] * 1000, "more": 1}
    assert differences(found, expected) == [
        "['lease']['until']: found 7, expected 8",
        "['more']: found nothing, expected 1",
    ]
    assert differences(found, dict(found)) == []


def test_e02_the_model_names_the_paths_that_differ():
    failure = failing(stores.ReleaseResetsDue, "test_MOD_02_long_trace")
    (line,) = [one for one in str(failure).splitlines() if ".due_at: found" in one][:1]
    assert "expected" in line
    assert len(line) < 400


def test_e03_versions_of_the_contract_are_both_named():
    failure = failing(OtherContract, "test_META_02_info_valid")
    assert "backend=1 suite=2" in str(failure)


def test_e04_a_failure_shows_the_frames_of_the_check_and_none_of_asyncio():
    failure = failing(stores.OutOfOrder, "test_ORD_05_read_after_excludes")
    files, place = [], failure.__traceback__
    while place is not None:
        files.append(place.tb_frame.f_code.co_filename)
        place = place.tb_next
    assert not [name for name in files if "asyncio" in name]
    assert "pyworkflow_conformance" in files[-1]


def test_e05_what_was_not_tried_is_not_called_uncovered():
    base = {name: one for name, one in results_of().items() if checks()[name].level == "base"}
    capabilities, _ = judge(checks(), base, ALL, "base")
    assert capabilities["durable"] == "not_tried"
    assert capabilities["payload_offload"] == "by_its_word"


def test_e06_a_keyword_is_looked_for_in_the_names_of_checks_alone(capsys):
    assert call("memory://", "-k", "con_01", "--profile", "base") == 0
    said = capsys.readouterr()
    assert "1/1" in said.out
    assert "META" not in said.err
    assert chosen_by("PAG_02 or not uni")("UNI_02_nul") is False
    assert chosen_by("(pag-02 or uni) and nul")("UNI_02_nul") is True
    with pytest.raises(ConfigurationError, match="keyword='and'"):
        chosen_by("and")
    assert call("memory://", "-k", "or or") == 2


def test_t02_the_slowest_checks_are_reported(capsys):
    assert call("memory://", "--only", "PAY-05", "--profile", "base") == 0
    assert "slowest: PAY-05 " in capsys.readouterr().out


def test_t03_each_check_is_printed_as_it_ends(capsys):
    assert call("memory://", "--only", "CON-01", "--only", "CON-10", "--profile", "base") == 0
    said = capsys.readouterr().err
    assert said.index("passed         CON-01 create_then_get") < said.index("CON-10 get_missing")


def test_t03_a_check_that_hangs_ends_and_names_the_calls_in_progress(monkeypatch):
    monkeypatch.setenv("PYWORKFLOW_CONFORMANCE_LIMIT", "0.5")
    failure = failing(Hangs, "test_CON_10_get_missing_none")
    assert "not over after 0.5 s; calls in progress:" in str(failure)
    assert "store 1: get_run(" in str(failure)


def test_t04_the_namespaces_of_a_run_are_in_its_report(tmp_path):
    call("memory://", "--only", "META-04", "--profile", "base", "--report", "json=r.json")
    names = json.loads((tmp_path / "r.json").read_text())["namespaces"]
    assert any(name.startswith("conformance-meta-04-") for name in names)
    assert any(name.endswith("-other") for name in names)


@pytest.fixture
def by_url():
    """The report of a networked store that passed all that a URL alone can show."""
    report = run_conformance("memory://", profile="base", only=["CON-01"])
    networked = dict.fromkeys(("CRA_09", "CRA_10", "MIG_06", "WATCH_03"), Status.NOT_APPLICABLE)
    found = results_of(**networked)
    capabilities, levels = judge(checks(), found, ALL, "full")
    return replace(
        report,
        profile="full",
        level="full",
        levels=levels,
        capabilities=capabilities,
        results=list(found.values()),
        unproved=["CRA-09", "CRA-10", "MIG-06", "WATCH-03"],
    )


def test_t01_a_networked_store_given_by_url_is_not_called_full(by_url):
    assert "reaches FULL by URL (" in summary(by_url)
    assert "not proved by a URL alone: CRA-09, CRA-10, MIG-06, WATCH-03" in summary(by_url)
    assert "**FULL by URL**" in matrix([by_url.to_json()])
    for kind in ("terminal", "badge", "shields", "junit"):
        assert "full by url" in FORMATS[kind](by_url).lower(), kind


def test_g10_what_no_server_was_killed_for_is_durable_by_its_word(by_url):
    assert by_url.capabilities["durable"] == "by_its_word"
    assert "durable           by its word" in FORMATS["terminal"](by_url)


def test_g10_a_store_for_many_hosts_names_what_its_url_did_not_prove():
    from pyworkflow_conformance._run import _unproved

    info = MemoryStorageBackend().info()
    results = {
        "CRA-09": Result("CRA-09", "x", "durable", Status.NOT_APPLICABLE, reason="server"),
        "CRA-04": Result("CRA-04", "x", "durable", Status.NOT_APPLICABLE, reason="files"),
        "WATCH-03": Result("WATCH-03", "x", "distributed", Status.NOT_APPLICABLE, reason="server"),
    }
    assert _unproved(info, results) == []
    declared = replace(info.capabilities, multi_host=True, durable=True)
    many = replace(info, capabilities=declared)
    assert _unproved(many, results) == ["CRA-09", "WATCH-03"]
    deaf = replace(info, capabilities=replace(declared, watch=False))
    assert _unproved(deaf, results) == ["CRA-09"]

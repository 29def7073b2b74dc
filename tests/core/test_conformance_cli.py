"""``pyworkflow conformance`` and ``run_conformance``: reports, levels, exit status, wrong use."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import pytest

from pyworkflow._memory import MemoryStorageBackend
from pyworkflow._plugins import register, unregister
from pyworkflow.cli import main
from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import Capabilities, hookimpl
from pyworkflow_conformance import run_conformance
from pyworkflow_conformance._formats import FORMATS, matrix, read_report
from pyworkflow_conformance._levels import GROUPS, LEVELS, PROOFS, checks
from pyworkflow_conformance._report import Status, highest, judge
from tests.conformance.broken import stores


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*args):
    """The exit status of ``pyworkflow conformance …``."""
    with pytest.raises(SystemExit) as ended:
        main(["conformance", *args])
    return ended.value.code


class Plugin:
    """Serves ``broken:`` URLs with one broken store."""

    def __init__(self, kind):
        self.kind = kind

    @hookimpl
    def pyworkflow_make_storage(self, url, options):
        if urlsplit(url).scheme != "broken":
            return None
        return self.kind(namespace=options["namespace"])


def test_a_sound_store_reaches_base_and_leaves_no_files_here(tmp_path, capsys):
    assert call("memory://", "--profile", "base") == 0
    said = capsys.readouterr()
    assert "memory reaches BASE" in said.out
    assert "FAILED" not in said.out
    assert list(tmp_path.iterdir()) == []


def test_a_broken_store_of_a_plugin_is_failed_by_the_named_check(tmp_path, capsys):
    plugin = Plugin(stores.OutOfOrder)
    register(plugin, "broken")
    try:
        status = call(
            *("broken://x", "--only", "ORD", "--report", "terminal"),
            *("--report", "json=r.json", "--seed", "7"),
        )
    finally:
        unregister(plugin)
    assert status == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema"] == 1
    assert (report["seed"], report["level"], report["reached"]) == (7, None, False)
    failed = {one["id"]: one for one in report["results"] if one["status"] == "failed"}
    assert "ORD-05" in failed
    assert "check=ORD-05 seed=7" in failed["ORD-05"]["detail"]
    assert "ORD-05" in report["levels"]["base"]["failed"]
    # A part of the suite reaches nothing: what did not run is named.
    assert "CON-01" in report["levels"]["base"]["missing"]
    said = capsys.readouterr().out
    assert "FAILED ORD-05 read_after_excludes" in said
    assert "fsck" in said


def test_a_part_that_is_right_ends_well_and_reaches_no_level(capsys):
    assert call("memory://", "--only", "CON-01", "--only", "ord-02") == 0
    said = capsys.readouterr().out
    assert "reaches no level" in said
    assert call("memory://", "-k", "PAG_02 or UNI_02", "--profile", "base") == 0


def test_every_report_is_written_in_its_form(tmp_path):
    kinds = [f"{kind}=r.{kind}" for kind in FORMATS]
    args = [part for kind in kinds for part in ("--report", kind)]
    assert call("file:store", "--only", "CON", "--profile", "base", *args) == 0
    suites = ET.fromstring((tmp_path / "r.junit").read_text(encoding="utf-8"))
    (suite,) = suites
    cases = suite.findall("testcase")
    assert int(suite.get("tests")) == len(cases)
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
    ET.fromstring((tmp_path / "r.badge").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "r.shields").read_text())["schemaVersion"] == 1
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert text == matrix([read_report((tmp_path / "r.json").read_text(), "r.json")])


def test_reports_become_one_matrix(tmp_path, capsys):
    for name, url in (("a", "memory://"), ("b", "file:store")):
        call(url, "--only", "CON-01", "--profile", "base", "--report", f"json={name}.json")
    capsys.readouterr()
    assert call("--matrix", "a.json", "b.json") == 0
    said = capsys.readouterr().out
    assert "|  | memory | file |" in said
    assert "| CON-01 create then get | ✓ | ✓ |" in said


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        ((), 2, "give one storage URL"),
        (("a:b", "c:d"), 2, "give one storage URL"),
        (("memory://", "--profile", "best"), 2, "'best' is not one of"),
        (("memory://", "--report", "pdf"), 2, "'pdf' is no kind of report"),
        (("memory://", "--report", "md", "--report", "json"), 2, "only one report goes to stdout"),
        (("memory://", "--report", "md=no/where.md"), 2, "the folder of the report is not there"),
        (("memory://", "--report", "md=a.md", "-o", "b.md"), 2, "leave out -o"),
        (("memory://", "--only", "CON-99"), 2, "there are no such checks: ids=CON-99"),
        (("memory://", "--namespace-prefix", "a/b"), 2, "namespace"),
        (("memory://", "--namespace-prefix", "x" * 25), 2, "1 to 24 characters"),
        (("nonsense://x",), 3, "nonsense"),
        (("no-url",), 3, "has no scheme"),
        (("--matrix",), 2, "--matrix needs JSON reports"),
        (("--matrix", "gone.json"), 2, "the report cannot be read"),
        (("--matrix", "memory://", "--report", "md"), 2, "leave out --report"),
    ],
)
def test_wrong_use_says_what_to_do(args, status, text, capsys):
    assert call(*args) == status
    assert text in capsys.readouterr().err


def test_what_is_no_report_is_refused_by_the_matrix(tmp_path, capsys):
    Path("a.json").write_text("{}")
    assert call("--matrix", "a.json") == 2
    assert "no report of this version: file=a.json" in capsys.readouterr().err


def test_a_server_that_is_not_there_makes_the_store_unusable(capsys):
    with socket.socket() as taken:  # bound and not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert call(f"redis://:secret@127.0.0.1:{port}/0", "--profile", "base") == 3
    said = capsys.readouterr().err
    assert "secret" not in said
    assert said.startswith("pyworkflow: ")


def test_without_the_suites_the_install_line_is_given(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "pyworkflow_conformance", None)
    monkeypatch.delitem(sys.modules, "pyworkflow.conformance", raising=False)
    assert call("memory://") == 3
    assert "pip install 'pyworkflow-conformance'" in capsys.readouterr().err


def test_a_factory_is_proved_in_python():
    made = []

    def make(namespace):
        made.append(namespace)
        return MemoryStorageBackend(namespace=namespace)

    seen = []
    report = run_conformance(make, profile="base", only=["META"], progress=seen.append)
    assert [one.id for one in seen] == [f"META-0{n}" for n in range(1, 8)]
    # META-06 and META-07 need a URL.
    assert [one.status for one in seen] == [*[Status.PASSED] * 5, *[Status.NOT_APPLICABLE] * 2]
    assert all(namespace.startswith("conformance-") for namespace in made)
    assert report.capabilities["batched"] == "proved"
    with pytest.raises(ConfigurationError, match="there is no such profile"):
        run_conformance(make, profile="best")


def test_the_runs_of_the_checks_are_removed_from_a_store_that_lasts(tmp_path):
    from pyworkflow_storage_file import FileStorageBackend

    report = run_conformance(f"file:{tmp_path}/store", profile="base", only=["CTL", "CON-01"])
    assert "conformance-*" in report.remains
    for place in (tmp_path / "store").iterdir():
        import asyncio

        async def count(name=place.name):
            async with FileStorageBackend(tmp_path / "store", namespace=name) as store:
                return (await store.stats())["runs"]

        if place.is_dir():
            assert asyncio.run(count()) == 0, place.name


def results_of(**changed):
    """Results of a run in which all passed but ``changed`` (underscores for hyphens)."""
    from pyworkflow_conformance._report import Result

    found = {
        check.id: Result(check.id, check.title, check.level, Status.PASSED)
        for check in checks().values()
    }
    for name, status in changed.items():
        check_id = name.replace("_", "-")
        if status is None:
            del found[check_id]
        else:
            found[check_id] = replace(found[check_id], status=status)
    return found


ALL = Capabilities(**dict.fromkeys(PROOFS, True))


def test_all_levels_are_reached_with_gaps_beside_them():
    found = results_of(GC_02=Status.GAP, CRA_04=Status.NOT_APPLICABLE)
    capabilities, levels = judge(checks(), found, ALL, "full")
    assert [judged.reached for judged in levels.values()] == [True] * 4
    assert levels["full"].gaps == ["GC-02"]
    assert levels["durable"].not_applicable == ["CRA-04"]
    assert capabilities["purge_by_age"] == "gap"
    assert capabilities["multi_host"] == "by_its_word"


@pytest.mark.parametrize("status", [Status.FAILED, Status.SKIPPED, None])
def test_a_level_with_a_failure_a_skip_or_a_hole_is_not_reached(status):
    _, levels = judge(checks(), results_of(CRA_01=status), ALL, "full")
    assert [judged.reached for judged in levels.values()] == [True, False, False, False]


def test_a_failure_at_any_level_leaves_none():
    # What is wrong is not right at a lower level.
    for failed in ({"CON_01": Status.FAILED}, {"CPY_11": Status.FAILED}, {"CPY_11": "skipped"}):
        found = results_of(**failed)
        _, levels = judge(checks(), found, ALL, "full")
        assert highest(levels, found) is None, failed
    found = results_of(CPY_11=None)  # it did not run
    assert highest(judge(checks(), found, ALL, "full")[1], found) == "distributed"
    assert highest(judge(checks(), results_of(), ALL, "full")[1], results_of()) == "full"


def test_a_level_says_what_it_is_reached_without_and_what_is_declared_must_be_exercised():
    _, levels = judge(checks(), results_of(), Capabilities(durable=True), "full")
    assert levels["durable"].without == []
    assert levels["distributed"].reached
    assert levels["distributed"].without == levels["full"].without == ["multi_process"]
    unseen = {proof.replace("-", "_"): Status.NOT_APPLICABLE for proof in PROOFS["durable"]}
    capabilities, levels = judge(checks(), results_of(**unseen), ALL, "full")
    assert capabilities["durable"] == "uncovered"
    assert levels["durable"].why == "nothing exercised durable"


def test_a_capability_that_fails_and_one_that_works_undeclared_are_named():
    capabilities, _ = judge(checks(), results_of(TIM_01=Status.FAILED), ALL, "full")
    assert capabilities["server_clock"] == "failed"
    capabilities, _ = judge(checks(), results_of(), Capabilities(), "full")
    assert capabilities["purge_by_age"] == "undeclared_works"


def test_every_check_has_a_level_a_guarantee_and_known_proofs():
    found = checks()
    assert {one.level for one in found.values()} == set(LEVELS)
    assert {one.split("-")[0] for one in found} == set(GROUPS)
    for proofs in PROOFS.values():
        assert set(proofs) <= set(found)
    assert all(one.guarantee for one in found.values())
    # Variants of one check: the first of the group says why.
    variants = {"CPY", "ENG", "FLT"}
    told = [one for one in found.values() if one.id.split("-")[0] not in variants]
    assert [one.id for one in told if "Usual cause" not in one.why] == []


def test_the_page_of_checks_is_up_to_date():
    from docs.write_conformance import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.write_conformance"

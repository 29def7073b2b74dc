"""What holds for the repository as a whole."""

from __future__ import annotations

import re
import sys
import tomllib
from typing import Any

from tests.repo.clone import ROOT, files

DISTRIBUTIONS = (
    "pyworkflow-celery",
    "pyworkflow-conformance",
    "pyworkflow-core",
    "pyworkflow-storage-file",
    "pyworkflow-storage-redis",
    "pyworkflow-storage-sql",
)
FOLDERS = (".", *DISTRIBUTIONS)


def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))


def test_one_version_everywhere() -> None:
    versions = {folder: project(folder)["project"]["version"] for folder in FOLDERS}
    assert len(set(versions.values())) == 1, versions
    version = versions["."]
    for init in ROOT.glob("pyworkflow-*/src/*/__init__.py"):
        match = re.search(r'^__version__ = "(.+)"$', init.read_text("utf-8"), re.MULTILINE)
        assert match is None or match[1] == version, init
    release = version.partition(".dev")[0]
    assert f"## [{release}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_workspace_has_every_distribution() -> None:
    assert tuple(project(".")["tool"]["uv"]["workspace"]["members"]) == DISTRIBUTIONS
    assert sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml")) == list(DISTRIBUTIONS)


def test_distributions_share_what_must_be_equal() -> None:
    for folder in FOLDERS:
        settings = project(folder)
        assert settings["build-system"] == project(".")["build-system"], folder
        for key in ("requires-python", "license", "license-files"):
            assert settings["project"][key] == project(".")["project"][key], (folder, key)
        shared, own = (set(each["project"]["classifiers"]) for each in (project("."), settings))
        assert shared <= own, folder
        assert all(more.startswith("Framework :: ") for more in own - shared), folder
        licence = (ROOT / folder / "LICENSE").read_text("utf-8")
        assert licence == (ROOT / "LICENSE").read_text("utf-8"), folder
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_the_core_needs_pluggy_and_pydantic_only() -> None:
    names = {
        re.split(r"[^\w-]", line)[0]
        for line in project("pyworkflow-core")["project"]["dependencies"]
    }
    assert names == {"pluggy", "pydantic"}


def test_one_distribution_owns_one_top_level_package() -> None:
    owners = {
        path.name: folder
        for folder in DISTRIBUTIONS
        for path in (ROOT / folder / "src").iterdir()
        if path.is_dir() and not path.name.endswith(".egg-info")
    }
    assert len(owners) == len(DISTRIBUTIONS)
    for package, folder in owners.items():
        expected = "pyworkflow" if folder == "pyworkflow-core" else folder.replace("-", "_")
        assert package == expected
        assert (ROOT / folder / "src" / package / "py.typed").is_file(), package


def test_entry_points_are_url_schemes_or_codecs_and_each_has_one_owner() -> None:
    schemes = [
        scheme
        for folder in DISTRIBUTIONS
        for scheme in project(folder)["project"].get("entry-points", {"pyworkflow": {}})[
            "pyworkflow"
        ]
    ]
    assert sorted(schemes) == [
        *("aesgcm", "celery", "file", "local", "memory", "offload", "postgres", "postgresql"),
        *("redis", "rediss", "sqlite", "zlib", "zstd"),
    ]


def test_the_running_python_is_one_that_tox_tests() -> None:
    env = f"py3{sys.version_info.minor}"
    listed = re.search(r"py3\{([\d,]+)\}", (ROOT / "tox.ini").read_text("utf-8"))
    assert listed is not None
    assert str(sys.version_info.minor) in listed[1].split(","), (
        f"this Python is not tested: found={env}; add it to env_list in tox.ini, and see that the "
        "replay loop's self-test passes on it"
    )


def test_no_lock_file_and_no_hosts_are_committed() -> None:
    assert not [path for path in files() if path.name == "uv.lock"]
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    assert "://" not in constraints
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[\w.]+( ;.*)?$", line) for line in pins)
    assert not [line for line in pins if line.startswith("pyworkflow")]


def test_no_file_names_a_machine() -> None:
    # Spelled in pieces, so that this file does not name one itself.
    paths = re.compile(
        "|".join(["/ro" + "ot/", "/ho" + r"me/\w", "/Us" + r"ers/\w", "/wo" + "rk/"])
    )
    found: list[str] = []
    for path in files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if paths.search(line)
        ]
    assert not found, "\n".join(found)


def test_every_lint_exception_ends_with_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    start = lines.index("ignore = [")
    end = lines.index("[tool.ruff.lint.pydocstyle]")
    rule = re.compile(r'^\s*"[A-Z]+\d*",|= \["[A-Z]+\d*"\]')
    bare = [line for line in lines[start:end] if rule.search(line) and "#" not in line]
    assert bare == ['"!pyworkflow-core/src/pyworkflow/_replay/**" = ["TID251"]'], bare
    ignore = re.compile(
        r"# (?:noqa|type: ignore|pyright: ignore)(?:: ?[A-Z]\w+(?:, ?[A-Z]\w+)*|\[[^]]*\])?(.*)"
    )
    silent = [
        f"{source.relative_to(ROOT)}:{number}"
        for source in ROOT.glob("pyworkflow-*/src/**/*.py")
        for number, line in enumerate(source.read_text("utf-8").splitlines(), 1)
        if (match := ignore.search(line)) and len(match[1].strip(" #-")) < 3
    ]
    assert not silent, f"end these with their reason (`# noqa: X  # why`): {silent}"


def test_ci_runs_the_readmes_test_command_to_the_letter() -> None:
    command = (
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt tox && .venv/bin/tox"
    )
    assert f"({command})" in (ROOT / ".ci" / "run").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert command in readme.replace("\\\n", " ").replace("  ", " ")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_pre_commit_has_the_version_of_ruff_that_ci_has() -> None:
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    hooked = re.search(r"rev: v(.+)", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert pinned is not None
    assert hooked is not None
    assert hooked[1] == pinned[1]


def test_hosted_ci_calls_the_same_command() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert "run: .ci/run" in workflow
    for minor in (11, 12, 13, 14):
        assert f"3.{minor}\n" in workflow


def test_the_map_of_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    core = ROOT / "pyworkflow-core" / "src" / "pyworkflow"
    table = text[text.index("| to change |") : text.index("## Set up")]
    named = set(re.findall(r"`([\w./*-]+(?:/|\.py|\.md))`", table))
    assert len(named) > 20
    places = (ROOT, core, core / "_engine", core / "storekit", ROOT / "tests" / "core")
    missing = [
        name
        for name in named
        if "<" not in name and not any(any(place.glob(name.rstrip("/"))) for place in places)
    ]
    assert missing == []

"""A report as text for a terminal, JUnit XML, JSON, Markdown, a badge; several as one matrix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from pyworkflow.errors import ConfigurationError
from pyworkflow_conformance._levels import GROUPS
from pyworkflow_conformance._report import SCHEMA, Report, Status

__all__ = ["FORMATS", "matrix", "read_report", "summary"]

_MARKS = {
    "passed": "✓",
    "failed": "✗ FAILED",
    "gap": "GAP",
    "not_applicable": "n/a",
    "skipped": "✗ SKIPPED",
    "missing": "✗ MISSING",
}
_COLOURS = {"full": "#2c7a2c", "distributed": "#4c9a2a", "durable": "#97a01b", "base": "#b08800"}
SLOWEST = 6
_NO_LEVEL = "#a33a2c"
# XML 1.0 has no way to say these.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def summary(report: Report) -> str:
    """One line: the level reached, and what stands beside it."""
    level = "no level" if report.level is None else report.level_text
    judged = report.levels[report.level or report.profile]
    beside = [f"without {', '.join(judged.without)}"] if judged.without else []
    beside += [
        f"{len(found)} {name}"
        for name, found in (
            ("failed", judged.failed),
            ("gaps", judged.gaps),
            ("not applicable", judged.not_applicable),
        )
        if found
    ]
    text = f"{report.backend} reaches {level}" + (f" ({', '.join(beside)})" if beside else "")
    if report.unproved:
        text += f"; not proved by a URL alone: {', '.join(report.unproved)}"
    if not report.reached:
        text += f"; {report.profile.upper()} not: {_why(report)}"
    return text


def _why(report: Report) -> str:
    """The reason at the lowest level that is not reached."""
    return next(judged.why for judged in report.levels.values() if not judged.reached)


def _terminal(report: Report) -> str:
    lines = [
        f"{report.backend} {report.location}",
        f"suite {report.version}, contract {report.contract_version}",
        f"profile {report.profile}, seed {report.seed}, {report.seconds:.1f} s",
        "",
    ]
    for group, (_, title) in GROUPS.items():
        found = [one for one in report.results if one.id.startswith(f"{group}-")]
        if found:
            passed = sum(one.status is Status.PASSED for one in found)
            lines.append(f"{group:<6}{passed:>3}/{len(found):<3} {title}")
        lines += [
            f"        {_MARKS[one.status]} {one.id} {one.title}: {one.reason}".rstrip(": ")
            for one in found
            if one.status not in {Status.PASSED, Status.MISSING}
        ]
    missing = [one.id for one in report.results if one.status is Status.MISSING]
    if missing:
        more = " …" if len(missing) > 10 else ""
        lines += ["", f"{len(missing)} did not run: {', '.join(missing[:10])}{more}"]
    for one in report.results:
        if one.detail:
            lines += ["", f"--- {one.id} {one.title}", one.detail]
    lines.append("")
    for name, state in report.capabilities.items():
        if state != "not_declared":
            lines.append(f"{name:<18}{state.replace('_', ' ')}")
    lines.append("")
    for level, judged in report.levels.items():
        done = "reached" if report.level is not None else "its checks pass"
        by_url = ", by URL" if judged.reached and level == report.level and report.unproved else ""
        lines.append(
            f"{level.upper():<18}{done if judged.reached else f'not: {judged.why}'}{by_url}"
        )
    slowest = sorted(report.results, key=lambda one: one.seconds, reverse=True)[:SLOWEST]
    times = ", ".join(f"{one.id} {one.seconds:.1f} s" for one in slowest if one.seconds >= 0.05)
    lines += ["", f"slowest: {times}"] if times else []
    lines += ["", summary(report)]
    if report.remains:
        lines.append(f"left in the store: {report.remains}")
    return "\n".join(lines) + "\n"


def _json(report: Report) -> str:
    return json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"


def _junit(report: Report) -> str:
    root = ET.Element("testsuites")
    failed = [one for one in report.results if one.status in {Status.FAILED, Status.MISSING}]
    unrun = [
        one
        for one in report.results
        if one.status in {Status.GAP, Status.NOT_APPLICABLE, Status.SKIPPED}
    ]
    suite = ET.SubElement(
        root,
        "testsuite",
        name=_xml(f"pyworkflow conformance {report.backend}"),
        timestamp=report.started.partition("+")[0],
        tests=str(len(report.results)),
        failures=str(len(failed)),
        errors="0",
        skipped=str(len(unrun)),
        time=f"{report.seconds:.3f}",
    )
    properties = ET.SubElement(suite, "properties")
    facts: Mapping[str, object] = {
        "backend": report.backend,
        "location": report.location,
        "profile": report.profile,
        "seed": report.seed,
        "level": report.level_text.lower(),
        **{f"capability.{name}": state for name, state in report.capabilities.items()},
    }
    for name, value in facts.items():
        ET.SubElement(properties, "property", name=name, value=_xml(str(value)))
    for one in report.results:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"conformance.{one.level}",
            name=f"{one.id} {one.title}",
            time=f"{one.seconds:.3f}",
        )
        if one in failed:
            told = ET.SubElement(case, "failure", message=_xml(one.reason or one.status))
            told.text = _xml(one.detail)
        elif one in unrun:
            ET.SubElement(case, "skipped", message=_xml(f"{one.status}: {one.reason}"))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)


def _markdown(report: Report) -> str:
    return matrix([report.to_json()])


def _badge(report: Report) -> str:
    left, right = "pyworkflow conformance", _badge_text(report)
    widths = [7 * len(left) + 10, 7 * len(right) + 10]
    colour = _COLOURS.get(report.level or "", _NO_LEVEL)
    total = sum(widths)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20" role="img" '
        f'aria-label="{escape(left)}: {escape(right)}">\n'
        f"<title>{escape(left)}: {escape(right)}</title>\n"
        f'<rect width="{widths[0]}" height="20" fill="#444"/>\n'
        f'<rect x="{widths[0]}" width="{widths[1]}" height="20" fill="{colour}"/>\n'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,sans-serif" font-size="11">\n'
        f'<text x="{widths[0] // 2}" y="14">{escape(left)}</text>\n'
        f'<text x="{widths[0] + widths[1] // 2}" y="14">{escape(right)}</text>\n'
        "</g>\n</svg>\n"
    )


def _badge_text(report: Report) -> str:
    if report.level is None:
        return "not reached"
    judged = report.levels[report.level]
    gaps = len(judged.gaps)
    return (
        report.level
        + (" by URL" if report.unproved else "")
        + "".join(f", not {name.replace('_', '-')}" for name in judged.without)
        + (f", {gaps} gap{'s' * (gaps > 1)}" if gaps else "")
    )


def _shields(report: Report) -> str:
    """For the endpoint badge of shields.io."""
    return (
        json.dumps(
            {
                "schemaVersion": 1,
                "label": "pyworkflow conformance",
                "message": _badge_text(report),
                "color": _COLOURS.get(report.level or "", _NO_LEVEL),
            }
        )
        + "\n"
    )


#: Kind of report → how it is written.
FORMATS: Mapping[str, Callable[[Report], str]] = {
    "terminal": _terminal,
    "junit": _junit,
    "json": _json,
    "md": _markdown,
    "badge": _badge,
    "shields": _shields,
}


def read_report(text: str, name: str) -> dict[str, Any]:
    """A JSON report read back, for the matrix.

    Raises:
        ConfigurationError: It is none, or one of another schema.
    """
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"no JSON report: file={name}: {error}") from None
    report = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if report.get("schema") != SCHEMA or not isinstance(report.get("results"), list):
        raise ConfigurationError(
            f"no report of this version: file={name} schema={report.get('schema')!r}; write it "
            "with --report json of the same pyworkflow-core"
        )
    return report


def matrix(reports: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown page of one or several reports, as ``to_json`` gives them."""
    names = [str(report["backend"]) for report in reports]
    rows = [
        _row("", names),
        _row("---", ["---"] * len(names)),
        _row("**level reached**", [f"**{_level_cell(report)}**" for report in reports]),
        _row("suite", [f"{r['version']}, contract {r['contract_version']}" for r in reports]),
        _row("run", [f"{r['started'][:10]}, seed {r['seed']}" for r in reports]),
    ]
    capabilities = list(dict.fromkeys(name for one in reports for name in one["capabilities"]))
    for name in capabilities:
        states = [str(one["capabilities"].get(name, "not_declared")) for one in reports]
        cells = ["" if state == "not_declared" else state.replace("_", " ") for state in states]
        rows.append(_row(f"`{name}`", cells))
    results = [{one["id"]: one for one in report["results"]} for report in reports]
    titles = {one["id"]: one["title"] for report in reports for one in report["results"]}
    lines = ["# Conformance", "", *rows, "", "## Checks", ""]
    lines += [_row("check", names), _row("---", ["---"] * len(names))]
    order = list(GROUPS)
    for check_id in sorted(titles, key=lambda one: (order.index(one.split("-")[0]), one)):
        cells = [
            _MARKS.get(one[check_id]["status"], "") if check_id in one else "" for one in results
        ]
        rows_name = f"{check_id} {titles[check_id].replace('_', ' ')}"
        lines.append(_row(rows_name, cells))
    lines += _notes(reports)
    return "\n".join(lines) + "\n"


def _notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for report in reports:
        told = [
            f"- {one['id']} {_MARKS[one['status']]}: {_cell(one['reason'])}"
            for one in report["results"]
            if one["status"] not in {"passed", "missing"}
        ]
        if told:
            lines += ["", f"## {report['backend']}: what did not pass, and why", "", *told]
    return lines


def _level_cell(report: Mapping[str, Any]) -> str:
    level = report["level"]
    if level is None:
        return "none"
    judged = report["levels"][level]
    without = "".join(f", not {name.replace('_', '-')}" for name in judged.get("without", ()))
    gaps = len(judged["gaps"])
    by_url = " by URL" if report.get("unproved") else ""
    return str(level).upper() + by_url + without + (f", {gaps} gaps" if gaps else "")


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([_cell(name), *map(_cell, cells)])} |"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")

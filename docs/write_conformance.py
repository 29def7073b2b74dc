"""Write the list of checks into ``reference/conformance.md``, from the checks themselves.

``python -m docs.write_conformance``; a test checks that the page is up to date.
"""

# ruff: noqa: INP001 - a script, run from the root of the repository

from __future__ import annotations

from pathlib import Path

from pyworkflow_conformance._levels import GROUPS, PROOFS, checks
from pyworkflow_conformance.executor import EXECUTOR_PROOFS, executor_checks

PAGE = Path(__file__).parent / "reference" / "conformance.md"
MARK = "<!-- from here on written by docs/write_conformance.py -->\n"


def page() -> str:
    """The page as it should be: what people wrote, and the list."""
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    lines = ["## Capabilities and their proofs", "", "| capability | proved by |", "|---|---|"]
    lines += [
        f"| `{name}` | {', '.join(proofs) or 'nothing: UNCOVERED when declared'} |"
        for name, proofs in PROOFS.items()
    ]
    lines += ["", "## All checks", ""]
    found = list(checks().values())
    for group, (level, title) in GROUPS.items():
        lines += [f"### {group} ({level.upper()}): {title}", ""]
        for check in found:
            if check.id.split("-")[0] != group:
                continue
            needs = f" *Needs {', '.join(check.needs)}.*" if check.needs else ""
            name = check.title.replace("_", " ")
            lines.append(f"- **{check.id} {name}** {check.guarantee} {check.why}{needs}".rstrip())
        lines.append("")
    lines += ["## Executors: capabilities and their proofs", "", "| capability | proved by |"]
    lines += ["|---|---|"]
    lines += [f"| `{name}` | {', '.join(proofs)} |" for name, proofs in EXECUTOR_PROOFS.items()]
    lines += ["", "## Executors: all checks", ""]
    for one in executor_checks():
        needs = f" *Needs {', '.join(one.needs)}.*" if one.needs else ""
        name = one.title.replace("_", " ")
        lines.append(f"- **{one.id} {name}** {one.guarantee} {one.why}{needs}".rstrip())
    lines.append("")
    return head + MARK + "\n" + "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

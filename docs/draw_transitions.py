"""Draw the life of an op into ``explanation/replay.md``, from replay's own table.

``python -m docs.draw_transitions`` writes the diagrams between the two markers; a test checks that
the page is up to date.
"""

# ruff: noqa: INP001 - a script, run from the root of the repository

from __future__ import annotations

from pathlib import Path

from pyworkflow._replay.transitions import TABLE, Action, OpKind, OpState

PAGE = Path(__file__).parent / "explanation" / "replay.md"
BEGIN = "<!-- begin: drawn by docs/draw_transitions.py -->"
END = "<!-- end: drawn by docs/draw_transitions.py -->"

#: What the code does is no event, so it is not in the table: it emits an op, and may give up one
#: that is not over.
EMIT = "the code emits it"
CANCEL = "the code gives it up"
_GIVEN_UP_FROM = (OpState.EMITTED, OpState.RECORDED)
_ENDS = (OpState.OVER, OpState.CANCELLED)


def diagram(kind: OpKind) -> str:
    """One kind of op as a Mermaid state diagram."""
    rows = [(s, event, to, act) for (k, s, event), (to, act) in TABLE.items() if k is kind]
    states = [s for s in OpState if any(s in (source, to) for source, _, to, _ in rows)]
    lines = [f"  [*] --> {OpState.EMITTED}: {EMIT}"]
    lines += [f"  {s} --> {OpState.CANCELLED}: {CANCEL}" for s in _GIVEN_UP_FROM if s in states]
    for source in states:
        for to in states:
            labels = _labels([(event, act) for s, event, t, act in rows if (s, t) == (source, to)])
            lines += [f"  {source} --> {to}: {label}" for label in labels]
    lines += [f"  {end} --> [*]" for end in _ENDS if end in states]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def _labels(moves: list[tuple[str, Action]]) -> list[str]:
    """One label per action, so that a diagram has few arrows."""
    return [
        f"{', '.join(str(event) for event, act in moves if act is action)} / {action}"
        for action in Action
        if any(act is action for _, act in moves)
    ]


def drawn() -> str:
    """What belongs between the markers."""
    parts = [f"### {kind}\n\n{diagram(kind)}" for kind in OpKind]
    return "\n\n".join([BEGIN, *parts, END])


def with_diagrams(page: str) -> str:
    """The page with today's diagrams."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page lacks its markers: {BEGIN} … {END}")
    return before + drawn() + after


if __name__ == "__main__":
    PAGE.write_text(with_diagrams(PAGE.read_text("utf-8")), "utf-8")

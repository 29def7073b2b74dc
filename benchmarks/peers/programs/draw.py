"""Draws readings: ``draw.py picture.png readings.json``. One panel a number, one bar a side.

The scale is logarithmic; next to each peer's bar stands how many times better ours was in the same
rounds, which need not be the ones of the bar of ours that is drawn.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

#: What is drawn, in order: workload, key, title.
PANELS = (
    ("W1", "p50", "W1: one run of 10 steps (ms)"),
    ("W2", "rate", "W2: many such runs at once (steps/s)"),
    ("W3", "time", "W3: 200 steps at once (ms)"),
    ("W4", "long", "W4: 8,000 steps in a row, each (ms)"),
    ("W5", "late p99", "W5: 2,000 sleepers, lateness p99 (ms)"),
    ("W6", "done", "W6: killed, until all is done (s)"),
    ("W7", "pss", "W7: idle worker (MB)"),
)
OURS, THEIRS = "#1f6f8b", "#b9b9b9"


def bars(figures: list[dict[str, Any]], workload: str, key: str) -> list[tuple[str, float, str]]:
    """Name, value and remark of each bar; ours once for each of its stores."""
    found: dict[str, tuple[str, float, str]] = {}
    for each in figures:
        if (each["workload"], each["key"]) != (workload, key):
            continue
        name = f"pyworkflow {each['our_store']}"
        if values := [value for value in each["ours"] if value is not None]:
            found.setdefault(name, (name, statistics.median(values), ""))
    for each in figures:
        values = [value for value in each["theirs"] if value is not None]
        if (each["workload"], each["key"]) != (workload, key) or not values:
            continue
        theirs = statistics.median(values)
        remark = each["note"].removeprefix("theirs: ")
        if each["ratio"]:
            gain = each["ratio"] if each["better"] == "more" else 1 / each["ratio"]
            remark = f"ours x {gain:.0f}" if gain >= 10 else f"ours x {gain:.2g}"
        name = f"{each['peer']} {each['store']}"
        found[name] = (name, theirs, remark)
    return list(found.values())


def main() -> None:
    figures = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["figures"]
    panels = [(title, bars(figures, w, key)) for w, key, title in PANELS]
    panels = [(title, values) for title, values in panels if values]
    heights = [len(values) + 1 for _, values in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.26 * sum(heights) + 0.6), height_ratios=heights, squeeze=False
    )
    for (title, values), axis in zip(panels, axes[:, 0], strict=True):
        names = [name for name, _, _ in values]
        numbers = [max(value, 1e-3) for _, value, _ in values]
        colours = [OURS if name.startswith("pyworkflow") else THEIRS for name in names]
        drawn = axis.barh(names, numbers, color=colours, log=True)
        labels = [f" {value:,.3g}" if value < 100 else f" {value:,.0f}" for _, value, _ in values]
        labels = [
            f"{label}   ({remark})" if remark else label
            for label, (_, _, remark) in zip(labels, values, strict=True)
        ]
        axis.bar_label(drawn, labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_xlim(min(numbers) / 3, max(numbers) * 8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()

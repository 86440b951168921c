"""The table of goals and measurements, from results.json into README.md and docs/performance.md.

python -m benchmarks.table
"""

from __future__ import annotations

import json

from benchmarks.measure import Row
from benchmarks.pages import ROOT, replace_table

BEGIN = "<!-- from benchmarks/results.json: `python -m benchmarks.table` -->"

GOALS: dict[str, list[tuple[str, str, float]]] = {
    "P1": [("tutorial / ours", "≥", 3), ("ours / products", "≤", 1.3)],
    "P2": [("one image at a time / ours", "≥", 6), ("tutorial (once a reference: 5 ×) / ours", "≥", 20)],
    "P3": [
        ("fp32: extraction / bare network", "≥", 0.95),
        ("bf16: extraction / bare network", "≥", 0.95),
        ("fp32: extraction / network and decoding alone", "", 0),
        ("bf16: extraction / network and decoding alone", "", 0),
    ],
    "P4": [
        ("resnet101, once a caption: live / cached", "≥", 10),
        ("resnet101, once an image: live / cached", "", 0),
        ("efficientnet_lite0, once an image: live / cached", "", 0),
    ],
    "P5": [("share of time spent on checkpoints", "≤", 0.01), ("longest stall / median step", "≤", 1)],
    "P6": [("share of a plain copy's speed", "≥", 0.8)],
    "P7": [("COCOEvalCap / ours", "≥", 3), ("the same for one captioner", "", 0)],
    "P8": [
        ("make repro: share of 720 s", "≤", 1),
        ("dvc repro, nothing to do: share of 10 s", "≤", 1),
        ("dvc repro --single-item --force report: share of 60 s", "≤", 1),
    ],
    "P9": [("own memory at the end / after the first tenth", "≤", 1.1)],
    "P10": [("slowest: share of 1 s", "≤", 1)],
}
"""Of each row the ratios that a goal is set for, and (without a sign) those that put them into proportion."""


def build_table(results: dict[str, list[Row]]) -> str:
    """Markdown; a goal that is missed is marked."""
    lines = ["| work | ratio | goal | measured |", "|---|---|--:|--:|"]
    for name, goals in GOALS.items():
        for row in results.get(name, []):
            title = str(row["work"])
            for ratio, sign, goal in goals:
                value = row["ratios"][ratio]
                met = not sign or (value >= goal if sign == "≥" else value <= goal)
                wanted = f"{sign} {goal:g}" if sign else ""
                lines.append(f"| {title} | {ratio} | {wanted} | {value:.3g}{'' if met else ' (missed)'} |")
                title = ""
    return "\n".join(lines)


def write_table(results: dict[str, list[Row]]) -> None:
    """Into both pages."""
    for page in ("README.md", "docs/performance.md"):
        replace_table(page, BEGIN, build_table(results))


if __name__ == "__main__":
    write_table(json.loads((ROOT / "benchmarks" / "results.json").read_text())["results"])

"""The table of goals and measurements, from results.json into README.md and docs/performance.md.

python -m benchmarks.table
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- from benchmarks/results.json: `python -m benchmarks.table` -->", "<!-- end -->"

GOALS: dict[str, list[tuple[str, str, float]]] = {
    "P1": [("tutorial / ours", "≥", 3), ("ours / products", "≤", 1.3)],
    "P2": [("tutorial (once a reference) / ours", "≥", 20), ("one image at a time / ours", "≥", 6)],
    "P3": [("bf16: extraction / bare network", "≥", 0.95), ("fp32: extraction / bare network", "≥", 0.95)],
    "P4": [("resnet101, once a caption: live / cached", "≥", 10)],
    "P5": [("share of time spent on checkpoints", "≤", 0.01), ("longest stall / median step", "≤", 1)],
    "P6": [("share of a plain copy's speed", "≥", 0.8)],
    "P7": [("COCOEvalCap / ours", "≥", 3)],
    "P8": [
        ("make repro: share of 720 s", "≤", 1),
        ("dvc repro, nothing to do: share of 10 s", "≤", 1),
        ("dvc repro --single-item --force report: share of 60 s", "≤", 1),
    ],
    "P9": [("own memory at the end / after the first tenth", "≤", 1.1)],
    "P10": [("slowest: share of 1 s", "≤", 1)],
}
"""Of each row the ratios that a goal is set for."""


def build_table(results: dict[str, list[Row]]) -> str:
    """Markdown; a goal that is missed is marked."""
    lines = ["| work | ratio | goal | measured |", "|---|---|--:|--:|"]
    for name, goals in GOALS.items():
        for row in results.get(name, []):
            title = str(row["work"])
            for ratio, sign, goal in goals:
                value = row["ratios"][ratio]
                met = value >= goal if sign == "≥" else value <= goal
                lines.append(f"| {title} | {ratio} | {sign} {goal:g} | {value:.3g}{'' if met else ' (missed)'} |")
                title = ""
    return "\n".join(lines)


def write_table(results: dict[str, list[Row]]) -> None:
    """Replaces what stands between the two marks."""
    table = build_table(results)
    for path in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        text = path.read_text()
        marked = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
        path.write_text(marked.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text))


if __name__ == "__main__":
    write_table(json.loads((ROOT / "benchmarks" / "results.json").read_text())["results"])

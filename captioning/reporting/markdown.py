"""reports/report.md: the leaderboard as a git host shows it. The same scores give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from captioning.reporting.leaderboard import ALL, Row, Table


def escape(text: str) -> str:
    """Text that Markdown and a table cell show as it is: newlines become spaces."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", flat)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int = 1) -> list[str]:
    """Lines of a Markdown table; columns behind the first `num_text_columns` are right-aligned."""
    rule = [":--" if column < num_text_columns else "--:" for column in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in [list(header), rule, *map(list, rows)]]


def render_markdown(tables: Sequence[Table], setting: Sequence[str], examples: Sequence[tuple[str, str, str]]) -> str:
    """The whole file.

    Args:
        setting: sentences that say how the numbers came about (split, references, tokeniser, beam).
        examples: (image id, a reference, the best captioner's caption).
    """
    lines = ["# Results", "", *setting, ""]
    for group in tables:
        title = "All sources" if group.group == ALL else f"Source: {escape(group.group)}"
        lines += [f"## {title} ({group.rows[0].num_images} images)", "", *_leaderboard(group), ""]
    lines += _attention(tables)
    if examples:
        rows = [[escape(cell) for cell in example] for example in examples]
        lines += ["## Examples", "", *table(["image", "a reference", "best captioner"], rows, 3), ""]
    return "\n".join(lines)


def _leaderboard(group: Table) -> list[str]:
    has_interval = any(row.interval for row in group.rows)
    header = ["captioner", *group.metrics, *(["CIDEr, 95 % interval"] if has_interval else [])]
    rows = []
    for row in group.rows:
        cells = [_score(row, metric, group.best(metric)) for metric in group.metrics]
        if has_interval:
            cells.append(f"{100 * row.interval.low:.1f} – {100 * row.interval.high:.1f}" if row.interval else "–")
        rows.append([f"`{row.captioner}`", *cells])
    return table(header, rows)


def _score(row: Row, metric: str, best: float | None) -> str:
    if metric not in row.scores:
        return "–"
    text = f"{100 * row.scores[metric]:.1f}"
    return f"**{text}**" if row.scores[metric] == best else text


def _attention(tables: Sequence[Table]) -> list[str]:
    rows = []
    for group in tables:
        for row in group.rows:
            if row.attention:
                score = row.attention
                rows.append(
                    [
                        escape(group.group),
                        f"`{row.captioner}`",
                        f"{score.factor.mean:.2f} ({score.factor.low:.2f} – {score.factor.high:.2f})",
                        f"{100 * score.hit_rate.mean:.1f} % ({100 * score.uniform_hit_rate:.1f} %)",
                        f"{score.num_words}",
                    ]
                )
    if not rows:
        return []
    header = ["source", "captioner", "factor (95 % interval)", "hits (by chance)", "words"]
    explanation = (
        "Where a generated word names a drawn object: attention inside the object's box, divided by what a uniform map "
        "puts there (1 is chance); and how often the strongest cell lies in the box."
    )
    return ["## Attention against the drawn boxes", "", explanation, "", *table(header, rows, 2), ""]

"""The leaderboard: every captioner's metrics, with intervals where per-image values exist, and its attention score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from captioning.annotations import Annotation
from captioning.reporting.attention_scores import AttentionScore, named_words, score_attention
from captioning.reporting.inputs import CaptionerResult, ReportInputs
from captioning.reporting.intervals import Interval, bootstrap_interval

RANKED_BY = "CIDEr"
ALL = "all"
"""The name of the group that holds every source."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One captioner on one group of images."""

    captioner: str
    scores: dict[str, float]
    """Metric → value, as pycocoevalcap scales them (0 to 1; CIDEr 0 to 10)."""
    interval: Interval | None
    """Of CIDEr, where the per-image values are parts of this group's score."""
    num_images: int
    attention: AttentionScore | None


@dataclass(frozen=True)
class Table:
    """A group's rows, best CIDEr first."""

    group: str
    metrics: list[str]
    rows: list[Row]

    def best(self, metric: str) -> float | None:
        """The column's best value; None where one captioner has nobody to beat."""
        values = [row.scores[metric] for row in self.rows if metric in row.scores]
        return max(values) if len(values) > 1 else None


def build_tables(inputs: ReportInputs) -> list[Table]:
    """The table of all images, then one per source where there are several."""
    sources = sorted({annotation.source for annotation in inputs.test})
    groups = [ALL, *sources] if len(sources) > 1 else [ALL]
    return [_build_table(group, inputs) for group in groups]


def _build_table(group: str, inputs: ReportInputs) -> Table:
    test = [annotation for annotation in inputs.test if group in (ALL, annotation.source)]
    rows = [_build_row(result, group, test) for result in inputs.captioners]
    found = dict.fromkeys(metric for row in rows for metric in row.scores)
    metrics = sorted(found, key=lambda metric: metric != RANKED_BY)  # stable: the others keep the order of params
    ranked = sorted(rows, key=lambda row: -row.scores.get(RANKED_BY, 0.0))  # stable: ties keep the order of params
    return Table(group, metrics, ranked)


def _build_row(result: CaptionerResult, group: str, test: Sequence[Annotation]) -> Row:
    tree = result.scores if group == ALL else result.scores["by_source"].get(group, {})
    scores = {
        name: float(value)
        for name, value in tree.items()
        if isinstance(value, int | float) and not name.startswith("num_")
    }
    interval = _interval(result, test, scores)
    attention = score_attention(named_words(result.attention, test)) if result.attention else None
    return Row(result.name, scores, interval, len(test), attention)


def _interval(result: CaptionerResult, test: Sequence[Annotation], scores: dict[str, float]) -> Interval | None:
    """CIDEr's interval, with the document frequencies held fixed."""
    per_image = result.image_scores.get(RANKED_BY)
    if not per_image or RANKED_BY not in scores:
        return None
    interval = bootstrap_interval([per_image[annotation.image_id] for annotation in test])
    # A source's own score counts document frequencies over its images alone, the per-image values over all of them:
    # an interval of those would be one of another quantity.
    return interval if abs(interval.mean - scores[RANKED_BY]) < TOLERANCE else None


def metrics_tree(tables: Sequence[Table], captioners: Sequence[str]) -> dict[str, Any]:
    """reports/metrics.json: captioner → numbers, per source under `by_source`; in the order of params."""
    tree: dict[str, Any] = {}
    for name in captioners:
        by_group = {table.group: _numbers(row) for table in tables for row in table.rows if row.captioner == name}
        tree[name] = by_group.pop(ALL)
        if by_group:
            tree[name]["by_source"] = by_group
    return tree


def _numbers(row: Row) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(row.scores)
    if row.interval:
        numbers |= {f"{RANKED_BY}_low": row.interval.low, f"{RANKED_BY}_high": row.interval.high}
    numbers["num_images"] = row.num_images
    if row.attention:
        score = row.attention
        numbers |= {
            "attention_factor": score.factor.mean,
            "attention_factor_low": score.factor.low,
            "attention_factor_high": score.factor.high,
            "attention_hit_rate": score.hit_rate.mean,
            "attention_hit_rate_uniform": score.uniform_hit_rate,
            "attention_num_words": score.num_words,
        }
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in numbers.items()}

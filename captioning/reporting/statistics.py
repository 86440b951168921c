"""reports/data.json for people: its numbers by split, and the caption lengths' histograms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from captioning import paths

Lengths = dict[str, dict[int, float]]
"""Split → number of words → number of captions."""


@dataclass
class Statistics:
    """The numbers of reports/data.json, whatever it holds: new ones need no change here."""

    by_split: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Group (a source, or "" for all data) → name → split → number."""
    single: dict[str, float] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=dict)


def arrange_statistics(tree: Mapping[str, Any]) -> Statistics:
    """Sorts the leaves of nested dicts: those below a split's name, histograms, and the others."""
    statistics = Statistics()
    _walk(tree, (), statistics)
    return statistics


def _walk(node: Any, path: tuple[str, ...], statistics: Statistics) -> None:
    splits = [part for part in path if part in paths.SPLITS]
    if isinstance(node, Mapping) and node and all(str(key).isdecimal() for key in node):
        # Of several histograms of a split (per source, say) the first is that of all its captions.
        statistics.lengths.setdefault(splits[0] if splits else "all", {int(key): node[key] for key in node})
    elif isinstance(node, Mapping):
        for key, value in node.items():
            _walk(value, (*path, str(key)), statistics)
    elif isinstance(node, int | float):
        *group, name = [part for part in path if part not in paths.SPLITS] or ["number"]
        if splits:
            title = " · ".join(part for part in group if part != "sources")
            statistics.by_split.setdefault(title, {}).setdefault(_plain(name), {})[splits[0]] = node
        else:
            statistics.single[" · ".join(_plain(part) for part in (*group, name))] = node


def _plain(key: str) -> str:
    return key.removeprefix("num_").removeprefix("by_").replace("_", " ")


def format_number(name: str, value: float) -> str:
    """An integer with thousands apart, a share in percent, anything else with four digits."""
    if any(word in name for word in ("rate", "coverage", "fraction", "share")) and 0 <= value <= 1:
        return f"{100 * value:.2f} %"
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.4g}"

"""Means with their 95 % intervals: a row for each group, a mark for each captioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.figures import draw_both, legend_below, look, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Marks = Mapping[str, Mapping[str, tuple[float, float, float]]]
"""Group → captioner → (value, low, high); low = high = value where no interval is known."""


def draw_intervals(
    folder: Path,
    name: str,
    captioners: Sequence[str],
    marks: Marks,
    *,
    title: str,
    label: str,
    reference: float | None = None,
) -> None:
    """Draws `marks` with the captioners' own looks.

    Args:
        label: what the horizontal axis counts, with its unit.
        reference: a value to compare with, such as chance; drawn as a line.
    """

    def draw(axes: Axes, theme: str) -> None:
        _draw(axes, theme, captioners, marks)
        if reference is not None:
            axes.axvline(reference, color=look(6, theme).colour, ls=":", lw=1.6, label="chance")
        axes.set(title=title, xlabel=label)
        axes.set_xlim(left=0)
        legend_below(axes, 3)

    num_rows = sum(len(row) for row in marks.values())
    draw_both(folder, name, draw, (5.6, 1.7 + 0.26 * num_rows))


def _draw(axes: Axes, theme: str, captioners: Sequence[str], marks: Marks) -> None:
    names = short_names(captioners)
    shown = [captioner for captioner in captioners if any(captioner in row for row in marks.values())]
    spacing = 0.7 / max(len(shown), 1)
    for rank, captioner in enumerate(shown):
        style = look(captioners.index(captioner), theme)
        offset = (rank - (len(shown) - 1) / 2) * spacing
        for row, group in enumerate(marks):
            if captioner not in marks[group]:
                continue
            value, low, high = marks[group][captioner]
            axes.plot([low, high], [row + offset] * 2, color=style.colour, lw=2.4, solid_capstyle="round", alpha=0.6)
            axes.plot(value, row + offset, color=style.colour, marker=style.marker, ms=6.5, ls="",
                      label=names[captioner] if row == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(marks)), list(marks))
    axes.set_ylim(len(marks) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)

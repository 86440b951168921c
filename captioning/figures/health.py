"""Small charts of a stage's health as inline SVG, coloured by the page's style: they follow its light and dark ground.

They belong to one run, so they never go to reports/figures/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 240, 64
MAX_POINTS = 120
"""More than a chart of this width can show."""
Point = tuple[float, float | None]
"""(seconds since the beginning, value); None where nothing was measured."""


@dataclass(frozen=True)
class Series:
    """One value over time."""

    title: str
    points: Sequence[Point]
    top: float
    """The upper end of the axis, which begins at 0."""
    colour: int
    """Number of the style's colour."""
    text: str
    """The values in words, for those who do not see the chart."""


def draw_chart(series: Series, duration: float, breaks: Sequence[float] = ()) -> str:
    """A filled line over time.

    Args:
        duration: seconds, the right end of the axis.
        breaks: seconds at which the stage was killed and began again.
    """
    width = duration or 1.0
    runs = [_place(run, width, series.top) for run in _unbroken(thin_out(series.points, duration))]
    lines = "".join(f'<path class="line" d="{_line(run)}"/>' for run in runs)
    areas = "".join(
        f'<path class="area" d="{_line(run)}V{HEIGHT}H{_short(run[0][0])}Z"/>' for run in runs if len(run) > 1
    )
    marks = "".join(f'<path class="break" d="M{_short(x)} 0V{HEIGHT}"/>' for x in (WIDTH * at / width for at in breaks))
    box = f"0 -2 {WIDTH} {HEIGHT + 3}"
    return (
        f'<svg class="chart c{series.colour}" viewBox="{box}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(series.title)}: {escape(series.text)}">'
        f'<path class="axis" d="M0 {HEIGHT}H{WIDTH}M0 0H{WIDTH}"/>{areas}{lines}{marks}</svg>'
    )


def thin_out(points: Sequence[Point], duration: float, num_points: int = MAX_POINTS) -> list[Point]:
    """At most so many points: the highest of each stretch of time, so that no peak is lost."""
    if len(points) <= num_points:
        return list(points)
    highest: dict[int, Point] = {}
    for at, value in points:
        stretch = min(int(num_points * at / (duration or 1.0)), num_points - 1)
        known = highest.get(stretch, (at, None))[1]
        if known is None or (value is not None and value > known):
            highest[stretch] = (at, value)
    return [highest[stretch] for stretch in sorted(highest)]


def _unbroken(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Runs of points with a value."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is not None:
            runs[-1].append((at, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _place(run: Sequence[tuple[float, float]], duration: float, top: float) -> list[tuple[float, float]]:
    scale = HEIGHT / (top or 1.0)
    return [(WIDTH * at / duration, HEIGHT - min(value, top) * scale) for at, value in run]


def _line(run: Sequence[tuple[float, float]]) -> str:
    if len(run) == 1:  # a dot
        run = [run[0], (run[0][0] + 0.5, run[0][1])]
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in run)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")

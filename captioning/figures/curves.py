"""Training curves: loss, learning rate and validation CIDEr over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.figures import draw_both, legend_below, look, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.5, 3.5)  # inches; three stand side by side
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Metric → (step, value)."""


def draw_training(folder: Path, captioners: Sequence[str], curves: Mapping[str, Curves]) -> list[str]:
    """Draws the curves of every captioner that has some; returns the names of the figures.

    Args:
        captioners: all of them in the order of params, which fixes their colours.
    """
    drawn = []
    figures = {
        "loss": (("train/loss", "val/loss"), _draw_loss),
        "learning-rate": (("train/learning_rate",), _draw_learning_rate),
        "validation-cider": (("val/CIDEr",), _draw_cider),
        "reward": (("train/reward",), _draw_reward),
    }
    for name, (drawable, draw) in figures.items():
        if any(curves[captioner].get(metric) for captioner in captioners for metric in drawable):
            draw_both(folder, name, lambda axes, theme, draw=draw: draw(axes, theme, captioners, curves), SIZE)  # type: ignore[misc]
            drawn.append(name)
    return drawn


def _draw_loss(axes: Axes, theme: str, captioners: Sequence[str], curves: Mapping[str, Curves]) -> None:
    names = short_names(captioners)
    for index, captioner in enumerate(captioners):
        style = look(index, theme)
        for metric, width, alpha, marker in (("train/loss", 1.2, 0.55, ""), ("val/loss", 2, 1, style.marker)):
            points = curves[captioner].get(metric, ())
            if points:
                label = f"{names[captioner]}, {metric.split('/')[0]}"
                axes.plot(*zip(*points, strict=True), color=style.colour, ls=style.line, lw=width, alpha=alpha,
                          marker=marker, ms=4.5, label=label)  # fmt: skip
    axes.set(title="Loss", xlabel="optimizer step", ylabel="cross entropy (nats per word)")
    legend_below(axes)


def _draw_learning_rate(axes: Axes, theme: str, captioners: Sequence[str], curves: Mapping[str, Curves]) -> None:
    _draw_lines(axes, theme, captioners, curves, "train/learning_rate", 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
    axes.set(title="Learning rate", xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    legend_below(axes, 3)


def _draw_cider(axes: Axes, theme: str, captioners: Sequence[str], curves: Mapping[str, Curves]) -> None:
    _draw_lines(axes, theme, captioners, curves, "val/CIDEr", 100.0, marked=True)
    axes.set(title="Validation CIDEr-D, greedy", xlabel="optimizer step", ylabel="CIDEr-D × 100", ylim=(0, None))
    legend_below(axes, 3)


def _draw_reward(axes: Axes, theme: str, captioners: Sequence[str], curves: Mapping[str, Curves]) -> None:
    _draw_lines(axes, theme, captioners, curves, "train/reward", 100.0)
    axes.set(title="CIDEr-D of draws, self-critical", xlabel="optimizer step", ylabel="CIDEr-D × 100")
    legend_below(axes, 3)


def _draw_lines(
    axes: Axes, theme: str, captioners: Sequence[str], curves: Mapping[str, Curves], metric: str, scale: float,
    marked: bool = False,
) -> None:  # fmt: skip
    names = short_names(captioners)
    for index, captioner in enumerate(captioners):
        points = [(step, scale * value) for step, value in curves[captioner].get(metric, ())]
        if points:
            style = look(index, theme)
            # Equal schedules lie on each other: a later, thinner line leaves the earlier one in sight.
            width = 2.0 if marked else max(3.2 - 0.9 * index, 1.2)
            axes.plot(*zip(*points, strict=True), color=style.colour, ls=style.line, lw=width,
                      marker=style.marker if marked else "", ms=4.5, label=names[captioner])  # fmt: skip
            if marked:  # the best epoch is the one whose model is kept
                step, value = max(points, key=lambda point: point[1])
                axes.plot(step, value, marker="o", ms=10, mfc="none", mec=style.colour, mew=1.6, ls="")

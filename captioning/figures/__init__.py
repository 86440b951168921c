"""The report's figures: one module a kind, one look for all, and the same bytes for the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by people with any colour vision; light and dark ground each get their own shades.
COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b65f94", "#946c00", "#3d8fc4", "#5b5b5b"),
    "dark": ("#56b4e9", "#ff9a52", "#2fd3a2", "#e39ac6", "#f0c04a", "#9ecbff", "#b9b9b9"),
}
LINES: tuple[str, ...] = ("-", "--", "-.", ":")
MARKERS: tuple[str, ...] = ("o", "s", "D", "^", "v", "P", "X")
GROUND = {"light": "#ffffff", "dark": "#161b22"}
INK = {"light": "#1f2933", "dark": "#d7dee6"}
FAINT = {"light": "#d5dbe1", "dark": "#333c47"}
SIZE = (5.6, 3.4)
"""Inches; at 160 dpi a figure is as sharp on a phone as on a desk."""
DPI = 160


@dataclass(frozen=True)
class Look:
    """How one captioner is drawn, the same in every figure."""

    colour: str
    line: str
    marker: str


def look(index: int, theme: str = "light") -> Look:
    """The look of captioner number `index` in the order of params; line styles tell apart what colours no longer do."""
    colours = COLOURS[theme]
    return Look(colours[index % len(colours)], LINES[index // len(colours) % len(LINES)], MARKERS[index % len(MARKERS)])


@contextmanager
def theme_context(theme: str) -> Iterator[Any]:
    """Seaborn's style in the theme's colours, drawn by Agg; leaves no global setting behind."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn

    ink, faint, ground = INK[theme], FAINT[theme], GROUND[theme]
    settings: Any = {
        "figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground,
        "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.edgecolor": faint, "grid.color": faint, "grid.linewidth": 0.8, "axes.titleweight": "bold",
        "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelsize": 10.5,
        "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 9.5, "legend.frameon": False,
        "font.family": "DejaVu Sans", "figure.dpi": 100, "text.parse_math": False,
    }  # fmt: skip
    with seaborn.axes_style("whitegrid"), matplotlib.rc_context(settings):
        yield seaborn


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the drawing alone."""
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is shown as boxes
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


Draw = Callable[["Axes", str], None]
"""Draws into axes for a theme."""


def draw_both(folder: Path, name: str, draw: Draw, size: tuple[float, float] = SIZE) -> None:
    """Draws `<name>.png` for a light ground and `<name>-dark.png` for a dark one."""
    for theme in ("light", "dark"):
        with theme_context(theme) as seaborn:
            import matplotlib.pyplot as plt

            figure, axes = plt.subplots(figsize=size, layout="constrained")
            draw(axes, theme)
            seaborn.despine(figure, left=True)
            save_figure(figure, folder / (f"{name}.png" if theme == "light" else f"{name}-dark.png"))


def legend_below(axes: Axes, num_columns: int = 2) -> None:
    """A legend under the axes, where it hides no data."""
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower center", ncols=num_columns, handlelength=2.4)  # type: ignore[call-arg]


def short_names(captioners: Sequence[str]) -> dict[str, str]:
    """Names without what all trained captioners share: one encoder needs not stand in every label."""
    encoders = {name.split("-", 1)[0] for name in captioners if "-" in name}
    return {name: name.split("-", 1)[1] if len(encoders) == 1 and "-" in name else name for name in captioners}

"""How numbers are spread: caption lengths, and CIDEr over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.figures import LINES, draw_both, legend_below, look, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_lengths(folder: Path, lengths: Mapping[str, Mapping[int, float]]) -> None:
    """Draws `caption-lengths`: for each split the share of captions with so many words.

    Args:
        lengths: split → number of words → number of captions.
    """

    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes, theme: str) -> None:
        for index, (split, counts) in enumerate(lengths.items()):
            total = sum(counts.values())
            if not total:
                continue
            words = range(min(counts), max(counts) + 1)
            shares = [100 * counts.get(number, 0) / total for number in words]
            style = look(index, theme)
            axes.step(words, shares, where="mid", color=style.colour, lw=2, ls=LINES[index % 4], label=split)
            axes.fill_between(words, shares, step="mid", color=style.colour, alpha=0.13)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title="Caption lengths", xlabel="words in a caption", ylabel="share of captions (%)", ylim=(0, None))
        legend_below(axes, 3)

    draw_both(folder, "caption-lengths", draw)


def draw_shares(folder: Path, captioners: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
    """Draws `cider-by-image`: for each captioner the share of images whose own CIDEr is at least a value.

    Args:
        captioners: all of them in the order of params, which fixes their colours.
        values: captioner → CIDEr of each image, as pycocoevalcap scales it.
    """
    names = short_names(captioners)

    def draw(axes: Axes, theme: str) -> None:
        for index, captioner in enumerate(captioners):
            if captioner in values:
                style = look(index, theme)
                found = sorted(100 * value for value in values[captioner])
                shares = [100 * (1 - rank / len(found)) for rank in range(len(found))]
                axes.step([0, *found], [100, *shares], where="pre", color=style.colour, lw=2, ls=style.line,
                          label=names[captioner])  # fmt: skip
        axes.set(
            title="Images with at least this CIDEr", xlabel="CIDEr of the image × 100", ylabel="share of images (%)"
        )
        axes.set_xlim(left=0)
        axes.set_ylim(0, 102)
        legend_below(axes, 3)

    draw_both(folder, "cider-by-image", draw)

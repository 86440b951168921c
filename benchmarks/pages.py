"""Tables in Markdown pages, between marks that say which command writes them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
END = "<!-- end -->"


def replace_table(page: str, begin: str, table: str) -> None:
    """Writes the table between the mark `begin` and the next `END` of a page, a path in the repository.

    Raises:
        ValueError: the page has not exactly one such place.
    """
    path = ROOT / page
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
    text, num_found = marked.subn(lambda _: f"{begin}\n{table}\n{END}", path.read_text())
    if num_found != 1:
        raise ValueError(f"{page} has {num_found} places for the table, marked by {begin} and {END}")
    path.write_text(text)

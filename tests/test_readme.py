"""README's numbers are those of the committed reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = {
    "LSTM, Bahdanau attention": "efficientnet_lite0-lstm",
    "GRU, Luong attention": "efficientnet_lite0-gru",
    "Transformer, 2 layers": "efficientnet_lite0-transformer",
    "BLIP, small, from scratch": "blip",
}
COLUMNS = ("Bleu_1", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
FACTORS = {"LSTM's attention lies in its box": "lstm", "the GRU's": "gru", "the Transformer's": "transformer"}


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((ROOT / "reports" / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_every_captioner_of_the_default_run_has_a_row(scores, readme: str) -> None:
    assert set(ROWS.values()) == set(scores)
    table = readme[: readme.index("`make repro` gives these numbers")]
    assert len(re.findall(r"^\| ", table, re.MULTILINE)) == 1 + len(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_scores(row: str, scores, readme: str) -> None:
    wanted = " | ".join(f"{100 * scores[ROWS[row]][column]:.1f}" for column in COLUMNS)
    assert f"| {row} | {wanted} |" in readme


@pytest.mark.parametrize("said", FACTORS)
def test_attention_factors(said: str, scores, readme: str) -> None:
    words = " ".join(readme.split())
    factor = re.search(rf"{said} (\d\.\d) times", words)
    assert factor and float(factor[1]) == round(scores[f"efficientnet_lite0-{FACTORS[said]}"]["attention_factor"], 1)

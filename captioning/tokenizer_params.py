"""`prepare.tokenizer` in params.yaml: what a caption is cut into. `name` decides which keys there are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from captioning.param_types import PositiveOrAuto, Section


class WordsTokenizer(Section):
    """A token is a word."""

    name: Literal["words"]
    min_frequency: PositiveOrAuto
    """A word that occurs less often in the train split becomes `<unk>`. `auto`: by the number of its captions."""


class WordPieceTokenizer(Section):
    """A token is a word or a piece of one (Schuster and Nakajima 2012; Devlin et al. 2019)."""

    name: Literal["wordpiece"]
    vocabulary_size: Annotated[int, Field(ge=100)]
    """Tokens at most, the four special ones counted: the most frequent ones in the train captions."""
    vocabulary_file: Path | None
    """Where the pieces come from: a file in the format of BERT's vocab.txt. null: learned from the train captions."""


TokenizerSettings = Annotated[WordsTokenizer | WordPieceTokenizer, Field(discriminator="name")]

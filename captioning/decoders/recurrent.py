"""LSTM and GRU decoders, with attention over regions or without.

Shapes by where attention stands: `attend_first` (Bahdanau; Xu et al. 2015) lets the context of the previous state drive
the cell, so words come one by one; `attend_last` (Luong et al. 2015) runs the cell over whole captions and attends with
all its outputs at once; Show and Tell (Vinyals et al. 2015), there, too, has the mean feature alone. Work that needs no
recurrence leaves the loop in all of them: the image is projected once for all its captions, the words' share of the
gates and the vocabulary's logits are one product. Input feeding alone makes every step wait for the one before.

Layers above the first read the one below (with dropout between). `attend_first` attends at the first one, so that the
others run over whole captions (as in Wu et al. 2016, section 3), `attend_last` at the last one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioning.attention import build_attention
from captioning.datasets import Batch
from captioning.decoders.base import Decoder, DecoderConfig, Memory, State, Step
from captioning.vocabulary import Vocabulary


class Ahead(NamedTuple):
    """One step of the recurrence, before the output layer."""

    attentional: Tensor  # (images, beams, hidden_dim): what the output layer reads
    attention_weights: Tensor  # (images, beams, num_regions)
    state: State


def run_layer(layer: nn.Module, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """(sequences, steps, dim) from states (sequences, hidden_dim): outputs (sequences, steps, hidden_dim), last states.

    Layers are stacked here, not in torch's modules: cuDNN draws the dropout between layers from a generator of its own,
    which a resumed run could not put back.
    """
    parts = tuple(part[None].contiguous() for part in state)
    if isinstance(layer, nn.LSTM):
        outputs, (hidden, cell) = layer(inputs, parts)
        return outputs, (hidden[0], cell[0])
    outputs, hidden = layer(inputs, parts[0])  # a GRU
    return outputs, (hidden[0],)


class RecurrentDecoder(Decoder):
    """What all shapes share. A state is (hidden, cell) or (hidden,), each (images, beams, num_layers × hidden_dim), and
    with input feeding the attentional vector of the word before."""

    compiled = ("remember", "combine")

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.num_states = 2 if config.type == "lstm" else 1
        region_dim = config.region_dim or config.encoder_dim
        self.region_dim = region_dim
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_dim)
        self.project = nn.Linear(config.encoder_dim, region_dim) if config.region_dim else None
        size = self.num_states * config.num_layers * config.hidden_dim
        self.initial = nn.Linear(region_dim, size) if config.initial_from_mean else None
        if config.attention != "none":
            attention_dim = config.attention_dim or 0
            self.attention = build_attention(config.attention, config.hidden_dim, region_dim, attention_dim)
            # Luong et al. 2015, equation 5: tanh(W [context; hidden]).
            self.attentional = nn.Linear(config.hidden_dim + region_dim, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.output.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        if config.tied_embeddings:
            self.output.weight = self.embedding.weight
        self.upper = nn.ModuleList(self.torch_layer(config.hidden_dim) for _ in range(config.num_layers - 1))

    def torch_layer(self, input_dim: int) -> nn.Module:
        layer = nn.LSTM if self.config.type == "lstm" else nn.GRU
        return layer(input_dim, self.config.hidden_dim, batch_first=True)

    def remember(self, features: Tensor) -> tuple[Memory, State]:
        features = features.to(self.embedding.weight.dtype)  # the cache's are float16
        regions = self.dropout(features if self.project is None else self.project(features).relu())
        state = self.first_state(regions)
        if self.config.input_feeding:
            state = (*state, regions.new_zeros(len(regions), 1, self.config.hidden_dim))
        return Memory(regions, self.keys(regions)), state

    def keys(self, regions: Tensor) -> Tensor:
        return self.attention.keys(regions)

    def first_state(self, regions: Tensor) -> State:
        """Of one beam, without what input feeding adds."""
        if self.initial is None:
            empty = regions.new_zeros(len(regions), 1, self.config.num_layers * self.config.hidden_dim)
            return (empty,) * self.num_states
        return tuple(self.initial(regions.mean(1)).tanh()[:, None].chunk(self.num_states, -1))

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(token_ids))

    def combine(self, hidden: Tensor, context: Tensor) -> Tensor:
        """(…, hidden_dim) and (…, region_dim) → the attentional vector (…, hidden_dim)."""
        return self.attentional(torch.cat([hidden, context], -1)).tanh()

    def run_layer(self, layer: nn.Module, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """As the function of this name, in chunks of steps."""
        outputs = []
        for steps in self.chunks(inputs.shape[1]):
            found, state = self.run_part(run_layer, layer, inputs[:, steps], state)
            outputs.append(found.transpose(0, 1))
        # Steps before sequences in memory, as a layer over whole captions has it: dropout draws in memory's order.
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).transpose(0, 1), state

    def climb(self, hidden: Tensor, state: State) -> tuple[Tensor, State]:
        """The layers above the first, over its outputs (sequences, steps, hidden_dim); states of all layers but the
        first, (sequences, (num_layers - 1) × hidden_dim)."""
        found = []
        for number, layer in enumerate(self.upper):
            start = number * self.config.hidden_dim
            parts = tuple(part[:, start : start + self.config.hidden_dim] for part in state)
            hidden, parts = self.run_layer(layer, self.dropout(hidden), parts)
            found.append(parts)
        return hidden, tuple(torch.cat(parts, -1) for parts in zip(*found, strict=True))

    def advance(self, memory: Memory, state: State, embedded: Tensor) -> Ahead:
        """One word further, from its embedding (images, beams, embedding_dim)."""
        raise NotImplementedError

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        ahead = self.advance(memory, state, self.embed(token_ids))
        return Step(self.output(self.dropout(ahead.attentional)), ahead.attention_weights, ahead.state)

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Attentional vectors (num_tokens, hidden_dim) and attention weights (num_tokens, num_regions) of whole
        captions, one step at a time. Shapes that need not wait for each word do better."""
        memory, state = self.remember(batch.features)
        state = tuple(part.expand(-1, batch.inputs.shape[1], -1) for part in state)
        embedded = self.embed(batch.inputs)
        vectors, weights = [], []
        for steps in self.chunks(len(batch.extents)):
            inputs = (batch.extents[steps], memory, state, embedded[:, :, steps])
            found, seen, state = self.run_part(self._run_steps, *inputs)
            vectors += found
            weights += seen
        return torch.cat(vectors).index_select(0, batch.kept), torch.cat(weights).index_select(0, batch.kept)

    def _run_steps(
        self, extents: list[tuple[int, int]], memory: Memory, state: State, embedded: Tensor
    ) -> tuple[list[Tensor], list[Tensor], State]:
        """Some steps of `run`: for each its vectors and weights, flattened, and the state after the last."""
        vectors, weights = [], []
        for step, (rows, columns) in enumerate(extents):
            running = Memory(*(part[:rows] for part in memory))
            state = tuple(part[:rows, :columns] for part in state)
            ahead = self.advance(running, state, embedded[:rows, :columns, step])
            state = ahead.state
            vectors.append(ahead.attentional.flatten(0, 1))
            weights.append(ahead.attention_weights.flatten(0, 1))
        return vectors, weights, state

    def read(self, batch: Batch) -> Tensor:
        return self.dropout(self.run(batch)[0])

    def read_with_coverage(self, batch: Batch) -> tuple[Tensor, Tensor]:
        vectors, weights = self.run(batch)
        caption = batch.places // batch.targets.shape[-1]
        images, captions = batch.targets.shape[:2]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        coverage = weights.new_zeros(images * captions, weights.shape[1]).index_add(0, caption, weights)
        exists = (batch.targets[..., 0] != Vocabulary.pad_id).flatten()
        return self.dropout(vectors), coverage[exists]

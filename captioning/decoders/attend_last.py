"""Recurrent decoders that attend after the cell, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioning.datasets import Batch
from captioning.decoders.base import DecoderConfig, Memory, State
from captioning.decoders.recurrent import Ahead, RecurrentDecoder


class AttendLast(RecurrentDecoder):
    """h_t = cell(word, h_{t-1}), then attention with h_t (Luong et al. 2015, section 3)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.cell = self.torch_layer(config.embedding_dim + config.input_feeding * config.hidden_dim)
        self.context_gate = nn.Linear(config.hidden_dim, self.region_dim) if config.context_gate else None

    def run_cells(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """All layers: (sequences, steps, dim) from states (sequences, num_layers × hidden_dim)."""
        size = self.config.hidden_dim
        outputs, first = self.run_layer(self.cell, inputs, tuple(part[:, :size] for part in state))
        if not len(self.upper):
            return outputs, first
        outputs, others = self.climb(outputs, tuple(part[:, size:] for part in state))
        return outputs, tuple(torch.cat(pair, -1) for pair in zip(first, others, strict=True))

    def look(self, memory: Memory, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (images, captions, hidden_dim) → contexts (images, captions, region_dim) and weights."""
        context, attention_weights = self.attention(hidden, memory.keys, memory.regions)
        if self.context_gate is not None:
            context = context * self.context_gate(hidden).sigmoid()
        return context, attention_weights

    def advance(self, memory: Memory, state: State, embedded: Tensor) -> Ahead:
        images, beams = embedded.shape[:2]
        if self.config.input_feeding:
            state, fed = state[:-1], state[-1]
            embedded = torch.cat([embedded, fed], -1)
        flat = tuple(part.reshape(images * beams, -1) for part in state)
        outputs, flat = self.run_cells(embedded.reshape(images * beams, 1, -1), flat)
        hidden = outputs.reshape(images, beams, -1)
        context, attention_weights = self.look(memory, hidden)
        new = tuple(part.reshape(images, beams, -1) for part in flat)
        vector = self.combine(hidden, context)
        return Ahead(vector, attention_weights, (*new, vector) if self.config.input_feeding else new)

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.config.input_feeding:
            return super().run(batch)
        memory, state = self.remember(batch.features)
        images, captions, steps = batch.inputs.shape
        flat = tuple(part.expand(-1, captions, -1).reshape(images * captions, -1) for part in state)
        outputs, _ = self.run_cells(self.embed(batch.inputs).flatten(0, 1), flat)
        laid_out = outputs.reshape(images, captions, steps, -1)
        found = [self.run_part(self._look_over, batch, chunk, memory, laid_out) for chunk in self.chunks(steps)]
        vectors, weights = zip(*found, strict=True)
        return (torch.cat(vectors), torch.cat(weights)) if len(found) > 1 else found[0]

    def _look_over(self, batch: Batch, steps: slice, memory: Memory, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Attentional vectors and weights of some steps' tokens, from the cells' outputs (images, captions, all steps,
        hidden_dim)."""
        rows, columns = batch.extents[steps.start]
        queries = outputs[:rows, :columns, steps].flatten(1, 2)
        found = (queries, *self.look(Memory(*(part[:rows] for part in memory)), queries))
        places = batch.places_within(steps)
        hidden, context, weights = (part.flatten(0, 1).index_select(0, places) for part in found)
        return self.combine(hidden, context), weights


class ShowAndTell(AttendLast):
    """No attention: the mean feature is the first state, or the first input. The weights are those of the mean, all
    equal: so a map is a distribution for this decoder, too, and says that it looks nowhere in particular."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.image = None if config.initial_from_mean else nn.Linear(self.region_dim, config.embedding_dim)

    def keys(self, regions: Tensor) -> Tensor:
        return regions

    def first_state(self, regions: Tensor) -> State:
        state = super().first_state(regions)
        if self.image is None:
            return state
        _, flat = self.run_cells(self.image(regions.mean(1))[:, None], tuple(part[:, 0] for part in state))
        return tuple(part[:, None] for part in flat)

    def look(self, memory: Memory, hidden: Tensor) -> tuple[Tensor, Tensor]:
        num_regions = memory.regions.shape[1]
        return hidden[..., :0], hidden.new_full((*hidden.shape[:2], num_regions), 1 / num_regions)

    def combine(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden

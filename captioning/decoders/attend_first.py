"""Recurrent decoders that attend before the cell: its step reads what the state before it saw."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioning.attention import AdditiveAttention
from captioning.datasets import Batch
from captioning.decoders.base import DecoderConfig, Memory, State, lay_out
from captioning.decoders.recurrent import Ahead, RecurrentDecoder
from captioning.decoders.unrolling import CELLS, unroll


class AttendFirst(RecurrentDecoder):
    """h_t = cell([word; context of h_{t-1}], h_{t-1}), the context gated or not."""

    attention: AdditiveAttention

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.cell = CELLS[config.type]
        width = self.cell.num_gates * config.hidden_dim
        self.word_gates = nn.Linear(config.embedding_dim, width)
        self.context_gates = nn.Linear(self.region_dim, width, bias=False)
        self.hidden_gates = nn.Linear(config.hidden_dim, width)
        self.context_gate = nn.Linear(config.hidden_dim, self.region_dim) if config.context_gate else None
        self.fed_gates = nn.Linear(config.hidden_dim, width, bias=False) if config.input_feeding else None

    def advance(self, memory: Memory, state: State, embedded: Tensor) -> Ahead:
        gates = self.word_gates(embedded)
        if self.fed_gates is not None:
            state, fed = state[:-1], state[-1]
            gates = gates + self.fed_gates(fed)
        size = self.config.hidden_dim
        first, others = (tuple(part[..., piece] for part in state) for piece in (slice(size), slice(size, None)))
        context, attention_weights = self.attention(first[0], memory.keys, memory.regions)
        if self.context_gate is not None:
            context = context * self.context_gate(first[0]).sigmoid()
        new, _ = self.cell.advance(gates + self.context_gates(context), self.hidden_gates(first[0]), first)
        hidden = new[0]
        if len(self.upper):
            flat = tuple(part.flatten(0, 1) for part in others)
            outputs, flat = self.climb(hidden.flatten(0, 1)[:, None], flat)
            hidden = outputs.view_as(hidden)
            new = tuple(torch.cat([a, b.view(*a.shape[:2], -1)], -1) for a, b in zip(new, flat, strict=True))
        vector = self.combine(hidden, context)
        return Ahead(vector, attention_weights, (*new, vector) if self.fed_gates is not None else new)

    def read(self, batch: Batch) -> Tensor:
        if self.config.input_feeding or self.context_gate is None:
            return super().read(batch)
        memory, state = self.remember(batch.features)
        words = [batch.inputs[:rows, :columns, t].flatten() for t, (rows, columns) in enumerate(batch.extents)]
        embedded = self.embed(torch.cat(words))
        running = tuple(part[..., : self.config.hidden_dim].expand(-1, batch.inputs.shape[1], -1) for part in state)
        assert self.context_gate is not None
        joined = (self.attention.query, self.context_gate, self.hidden_gates)
        from_state = torch.cat([m.weight for m in joined]), torch.cat([m.bias for m in joined])
        found, start = [], 0
        for steps in self.chunks(len(batch.extents)):
            extents = batch.extents[steps]
            end = start + sum(rows * columns for rows, columns in extents)
            part = self.run_part(self._unroll, extents, memory, running, embedded[start:end], from_state)
            found.append(part[:2])
            running, start = part[2], end
        hidden, gated = (torch.cat(pair).index_select(0, batch.kept) for pair in zip(*found, strict=True))
        if len(self.upper):
            hidden = self._climb_whole(hidden, state, batch)
        return self.dropout(self.combine(hidden, gated))

    def _unroll(
        self,
        extents: list[tuple[int, int]],
        memory: Memory,
        state: State,
        embedded: Tensor,
        from_state: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, State]:
        """Some steps, from the first layer's state and the words' embeddings packed: hidden states and gated contexts,
        packed alike, and the state after the last step."""
        word_gates = self.word_gates(embedded)
        dtype = word_gates.dtype  # of autocast, where that is on
        rows, columns = extents[0]
        return unroll(
            self.cell,
            extents,
            word_gates,
            memory.keys,
            memory.regions.to(dtype),
            tuple(part[:rows, :columns].to(dtype) for part in state),
            (from_state[0].to(dtype), from_state[1].to(dtype)),
            self.context_gates.weight.to(dtype),
            self.attention.score.weight[0].to(memory.keys.dtype),
            self.recomputes,
        )

    def _climb_whole(self, hidden: Tensor, state: State, batch: Batch) -> Tensor:
        """The layers above the first over whole captions, packed (num_tokens, hidden_dim) as they come and go."""
        captions = batch.inputs.shape[1]
        above = tuple(part[..., self.config.hidden_dim :].expand(-1, captions, -1).flatten(0, 1) for part in state)
        outputs, _ = self.climb(lay_out(hidden, batch).flatten(0, 1), above)
        return outputs.flatten(0, 1).index_select(0, batch.places)

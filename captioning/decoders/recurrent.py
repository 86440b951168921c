"""LSTM and GRU decoders with attention over regions.

Two shapes, by where attention stands: `AttendFirst` (Bahdanau; Xu et al. 2015) lets the context of the previous state
drive the cell, so words come one by one; `AttendLast` (Luong et al. 2015, without input feeding) runs the cell over
whole captions and attends with all its outputs at once. Work that needs no recurrence leaves the loop in both: the
image is projected once for all its captions, the words' share of the gates and the vocabulary's logits are one product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captioning.attention import AdditiveAttention, build_attention
from captioning.datasets import Batch
from captioning.decoders.base import Decoder, DecoderConfig, Memory, State, Step
from captioning.decoders.unrolling import CELLS, unroll


class RecurrentDecoder(Decoder):
    """What both shapes share: embedding, regions, initial state and the output layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.num_states = 2 if config.type == "lstm" else 1  # (hidden, cell) or (hidden,)
        region_dim = config.region_dim or config.encoder_dim
        self.region_dim = region_dim
        self.embedding = nn.Embedding(config.vocabulary_size, config.embedding_dim)
        self.project = nn.Linear(config.encoder_dim, region_dim) if config.region_dim else None
        self.initial = nn.Linear(region_dim, self.num_states * config.hidden_dim)
        self.attention = build_attention(config.attention, config.hidden_dim, region_dim, config.attention_dim)
        # Luong et al. 2015, equation 5: tanh(W [context; hidden]).
        self.attentional = nn.Linear(config.hidden_dim + region_dim, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.output.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)

    def remember(self, features: Tensor) -> tuple[Memory, State]:
        features = features.to(self.embedding.weight.dtype)  # the cache's are float16
        regions = self.dropout(features if self.project is None else self.project(features).relu())
        initial = self.initial(regions.mean(1)).tanh()[:, None]  # (images, 1 beam, num_states × hidden_dim)
        return Memory(regions, self.attention.keys(regions)), tuple(initial.chunk(self.num_states, -1))

    def logits(self, hidden: Tensor, context: Tensor) -> Tensor:
        """(…, hidden_dim) and (…, region_dim) → (…, vocabulary_size)."""
        attentional = self.attentional(torch.cat([hidden, context], -1)).tanh()
        return self.output(self.dropout(attentional))

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(token_ids))


class AttendFirst(RecurrentDecoder):
    """h_t = cell([word; gated context of h_{t-1}], h_{t-1}); the gate is that of Xu et al. 2015, section 4.2.1."""

    attention: AdditiveAttention

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.cell = CELLS[config.type]
        width = self.cell.num_gates * config.hidden_dim
        self.word_gates = nn.Linear(config.embedding_dim, width)
        self.context_gates = nn.Linear(self.region_dim, width, bias=False)
        self.hidden_gates = nn.Linear(config.hidden_dim, width)
        self.context_gate = nn.Linear(config.hidden_dim, self.region_dim)

    def _advance(self, memory: Memory, state: State, word_gates: Tensor) -> tuple[State, Tensor, Tensor]:
        """One step from the words' share of the gates (images, beams, width): new state, context, weights."""
        context, attention_weights = self.attention(state[0], memory.keys, memory.regions)
        gated = context * self.context_gate(state[0]).sigmoid()
        inputs, hidden = word_gates + self.context_gates(gated), self.hidden_gates(state[0])
        return self.cell.advance(inputs, hidden, state)[0], gated, attention_weights

    def forward(self, batch: Batch) -> Tensor:
        memory, state = self.remember(batch.features)
        words = [batch.inputs[:rows, :columns, t].flatten() for t, (rows, columns) in enumerate(batch.extents)]
        word_gates = self.word_gates(self.embed(torch.cat(words)))
        dtype = word_gates.dtype  # of autocast, where that is on
        from_state = (self.attention.query, self.context_gate, self.hidden_gates)
        packed = unroll(
            self.cell,
            batch.extents,
            word_gates,
            memory.keys,
            memory.regions.to(dtype),
            tuple(part.expand(-1, batch.inputs.shape[1], -1).to(dtype) for part in state),
            (torch.cat([m.weight for m in from_state]).to(dtype), torch.cat([m.bias for m in from_state]).to(dtype)),
            self.context_gates.weight.to(dtype),
            self.attention.score.weight[0].to(memory.keys.dtype),
        )
        return self.logits(*(part.index_select(0, batch.kept) for part in packed))

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        state, context, attention_weights = self._advance(memory, state, self.word_gates(self.embed(token_ids)))
        return Step(self.logits(state[0], context), attention_weights, state)


class AttendLast(RecurrentDecoder):
    """h_t = cell(word, h_{t-1}), then attention with h_t (Luong et al. 2015, section 3, without input feeding)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        cell = nn.LSTM if config.type == "lstm" else nn.GRU
        self.cell = cell(config.embedding_dim, config.hidden_dim, batch_first=True)

    def _run(self, embedded: Tensor, state: State) -> tuple[Tensor, State]:
        """(sequences, steps, embedding_dim) from states (1, sequences, hidden_dim): outputs and last states."""
        if self.config.type == "lstm":
            outputs, (hidden, cell) = self.cell(embedded, state)
            return outputs, (hidden, cell)
        outputs, hidden = self.cell(embedded, state[0])
        return outputs, (hidden,)

    def forward(self, batch: Batch) -> Tensor:
        memory, state = self.remember(batch.features)
        images, captions, steps = batch.inputs.shape
        flat = tuple(part.expand(-1, captions, -1).reshape(1, images * captions, -1) for part in state)
        outputs, _ = self._run(self.embed(batch.inputs).flatten(0, 1), flat)
        queries = outputs.reshape(images, captions * steps, -1)
        context, _ = self.attention(queries, memory.keys, memory.regions)
        hidden, context = (part.flatten(0, 1).index_select(0, batch.places) for part in (queries, context))
        return self.logits(hidden, context)

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        images, beams = token_ids.shape
        flat = tuple(part.reshape(1, images * beams, -1) for part in state)
        outputs, flat = self._run(self.embed(token_ids).view(images * beams, 1, -1), flat)
        hidden = outputs.reshape(images, beams, -1)
        context, attention_weights = self.attention(hidden, memory.keys, memory.regions)
        state = tuple(part.reshape(images, beams, -1) for part in flat)
        return Step(self.logits(hidden, context), attention_weights, state)


def build_recurrent(config: DecoderConfig) -> Decoder:
    """An LSTM or GRU decoder whose shape follows from its attention."""
    return AttendFirst(config) if config.attention == "bahdanau" else AttendLast(config)

"""A Transformer decoder with cross-attention over regions (Vaswani et al. 2017), pre-norm (Xiong et al. 2020).

Regions carry no positions of their own: to this decoder they are a set, since views and class tokens lie on no grid,
and a network's features tell where they are. Its weights for attention maps are the last layer's cross-attention,
averaged over heads: what the predicted word is read from. Layers below write into one another, so that a mean over
all of them would show places that no word came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from captioning.datasets import Batch
from captioning.decoders.base import Decoder, DecoderConfig, Memory, State, Step, lay_out
from captioning.errors import CapstanError

attend = functional.scaled_dot_product_attention


def sinusoids(first: int, count: int, dim: int, like: Tensor) -> Tensor:
    """Positions from `first` on (Vaswani et al. 2017, section 3.5): (count, dim) in [-1, 1], sines before cosines."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10000.0) / half))
    angles = torch.arange(first, first + count, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim].to(like.dtype)


def split_heads(values: Tensor, num_heads: int) -> Tensor:
    """(rows, places, num_heads × dim) → (rows, num_heads, places, dim), as attention reads it."""
    return values.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(values: Tensor) -> Tensor:
    """The reverse of `split_heads`."""
    return values.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Self-attention, cross-attention where `crosses`, and a feed-forward network, each added to what it read.

    How words see one another and the regions is the caller's: whole captions and single steps share this.
    """

    def __init__(self, dim: int, feedforward_dim: int, dropout: float, crosses: bool) -> None:
        super().__init__()
        self.self_norm, self.self_inputs = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.self_output = nn.Linear(dim, dim)
        self.crosses = crosses
        if crosses:
            self.cross_norm, self.cross_query = nn.LayerNorm(dim), nn.Linear(dim, dim)
            self.cross_output = nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, feedforward_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(feedforward_dim, dim),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, values: Tensor, relate: Callable[[Tensor], Tensor], look: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Values (…, dim); `relate`: queries, keys and values (…, 3 × dim) → (…, dim); `look`: queries (…, dim) →
        (…, dim) from the regions."""
        values = values + self.dropout(self.self_output(relate(self.self_inputs(self.self_norm(values)))))
        if look is not None:
            values = values + self.dropout(self.cross_output(look(self.cross_query(self.cross_norm(values)))))
        added: Tensor = self.dropout(self.feedforward(values))
        return values + added


class TransformerDecoder(Decoder):
    """Words are computed packed, without padding; only self- and cross-attention lay them out in their captions."""

    compiled = ("read",)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        dim, self.num_heads, self.max_steps = config.hidden_dim, config.num_heads, config.num_positions
        sizes = (dim, config.feedforward_dim, config.dropout)
        self.embedding = nn.Embedding(config.vocabulary_size, dim)
        learned = config.positions == "learned" and config.num_positions
        self.position_embedding = nn.Embedding(learned, dim) if learned else None
        self.project = nn.Linear(config.encoder_dim, dim)
        self.encoder = nn.ModuleList(Layer(*sizes, crosses=False) for _ in range(config.num_encoder_layers))
        self.region_norm = nn.LayerNorm(dim)
        self.region_keys = nn.Linear(dim, config.num_layers * 2 * dim)  # keys and values of all layers: one product
        self.layers = nn.ModuleList(Layer(*sizes, crosses=True) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, config.vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        # `embed` scales them to the size of sinusoids; as output weights they begin with logits of about 1.
        for module in (self.embedding, self.position_embedding, self.output):
            if module is not None:
                nn.init.normal_(module.weight, std=dim**-0.5)
        nn.init.zeros_(self.output.bias)
        if config.tied_embeddings:
            self.output.weight = self.embedding.weight

    def remember(self, features: Tensor) -> tuple[Memory, State]:
        regions = self.dropout(self.project(features.to(self.embedding.weight.dtype)))  # the cache's are float16
        for layer in self.encoder:
            regions = self.run_part(layer, regions, self._relate_regions)
        regions = self.region_norm(regions)
        images, num_regions = regions.shape[:2]
        keys = self.region_keys(regions).view(images, num_regions, len(self.layers), 2, self.num_heads, -1)
        keys = keys.permute(0, 2, 3, 4, 1, 5)  # (images, layers, 2, heads, num_regions, dim of a head)
        # Of each layer: keys and values (images, beams, 2, heads, steps so far, dim of a head).
        empty = keys.new_zeros(images, 1, 2, self.num_heads, 0, keys.shape[-1])
        return Memory(regions, keys), (empty,) * len(self.layers)

    def _relate_regions(self, inputs: Tensor) -> Tensor:
        queries, keys, values = (split_heads(part, self.num_heads) for part in inputs.chunk(3, -1))
        return join_heads(attend(queries, keys, values))

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids and what their positions add, (…) and (…, hidden_dim) → (…, hidden_dim)."""
        embedded: Tensor = self.dropout(self.embedding(token_ids) * self.config.hidden_dim**0.5 + positions)
        return embedded

    def positions(self, first: int, count: int) -> Tensor:
        """(count, hidden_dim). Raises CapstanError beyond the learned ones."""
        if self.position_embedding is None:
            return sinusoids(first, count, self.config.hidden_dim, self.embedding.weight)
        if first + count > self.position_embedding.num_embeddings:
            raise CapstanError(
                f"a caption needs {first + count} positions, the Transformer has learned "
                f"{self.position_embedding.num_embeddings}; raise decoder_settings.<name>.num_positions, set "
                "positions: sinusoidal, or lower prepare.max_length_percentile or generate.max_length"
            )
        return self.position_embedding.weight[first : first + count] * self.config.hidden_dim**0.5

    def read(self, batch: Batch) -> Tensor:
        memory, _ = self.remember(batch.features)
        images, captions, steps = batch.inputs.shape

        def relate(inputs: Tensor) -> Tensor:
            laid_out = lay_out(inputs, batch).view(images * captions, steps, -1)
            queries, keys, values = (split_heads(part, self.num_heads) for part in laid_out.chunk(3, -1))
            seen = join_heads(attend(queries, keys, values, is_causal=True))
            return seen.flatten(0, 1).index_select(0, batch.places)

        def look(queries: Tensor, keys: Tensor) -> Tensor:
            laid_out = split_heads(lay_out(queries, batch).view(images, captions * steps, -1), self.num_heads)
            seen = join_heads(attend(laid_out, keys[:, 0], keys[:, 1]))
            return seen.flatten(0, 1).index_select(0, batch.places)

        positions = self.positions(0, steps).index_select(0, batch.places % steps)
        words = self.embed(batch.inputs.view(-1).index_select(0, batch.places), positions)
        for layer, keys in zip(self.layers, memory.keys.unbind(1), strict=True):
            words = self.run_part(layer, words, relate, lambda queries, keys=keys: look(queries, keys))
        return self.norm(words)

    def step(self, memory: Memory, state: State, token_ids: Tensor) -> Step:
        grown: list[Tensor] = []
        attention_weights = memory.regions.new_zeros(())

        def relate(inputs: Tensor) -> Tensor:
            """One more word for each beam, (images, beams, 3 × hidden_dim), which sees those before it."""
            parts = inputs.unflatten(-1, (3, self.num_heads, 1, -1))
            grown.append(torch.cat([state[len(grown)], parts[:, :, 1:]], -2))
            cache = grown[-1].flatten(0, 1)
            seen = attend(parts[:, :, 0].flatten(0, 1), cache[:, 0], cache[:, 1])
            return seen.reshape(*inputs.shape[:2], -1)

        def look(queries: Tensor) -> Tensor:
            nonlocal attention_weights
            keys, values = memory.keys[:, len(grown) - 1].unbind(1)
            queries = split_heads(queries, self.num_heads)
            if len(grown) < len(self.layers):
                return join_heads(attend(queries, keys, values))
            weights = (queries @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5).softmax(-1)
            attention_weights = weights.mean(1)
            return join_heads(weights @ values)

        words = self.embed(token_ids, self.positions(state[0].shape[-2], 1))
        for layer in self.layers:
            words = layer(words, relate, look)
        return Step(self.output(self.norm(words)), attention_weights, tuple(grown))

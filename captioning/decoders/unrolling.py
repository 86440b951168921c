"""A recurrent decoder with attention before its cell, over whole captions: one differentiable function for all steps.

Written out, the backward pass does what autograd's cannot. The gradients of the weights are one product over all steps,
not one a step and a sum of as many weight matrices; what attention compares, by far the largest value of a step, is
computed again where it is needed, so that it stays in the cache and memory does not grow with the captions' length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captioning.attention import distances, exponential, slopes

State = tuple[Tensor, ...]


class LSTM:
    """Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; gates: write, keep, show, new."""

    num_gates = 4

    @staticmethod
    def advance(inputs: Tensor, hidden: Tensor, state: State) -> tuple[State, State]:
        """One step from what the input and the state give to the gates (…, 4 × hidden_dim): the new (hidden, cell),
        and what `retreat` needs."""
        gates = inputs + hidden
        size = gates.shape[-1] // 4
        write, keep, show = gates[..., : 3 * size].sigmoid().chunk(3, -1)
        new = gates[..., 3 * size :].tanh()
        cell = keep * state[1] + write * new
        tanh = cell.tanh()
        return (show * tanh, cell), (write, keep, show, new, tanh, state[1])

    @staticmethod
    def retreat(gradient: State, saved: State) -> tuple[Tensor, Tensor, State]:
        """From the new state's gradients those of the inputs' and the hidden's gates, and of the state before (that of
        the hidden state: what does not pass through the gates)."""
        write, keep, show, new, tanh, before = saved
        for_hidden, for_cell = gradient
        for_cell = for_cell + for_hidden * show * (1 - tanh * tanh)
        for_gates = torch.cat(
            [
                for_cell * new * write * (1 - write),
                for_cell * before * keep * (1 - keep),
                for_hidden * tanh * show * (1 - show),
                for_cell * write * (1 - new * new),
            ],
            -1,
        )
        return for_gates, for_gates, (torch.zeros_like(for_hidden), for_cell * keep)


class GRU:
    """Cho et al. 2014, with the reset gate behind the product, as torch has it; gates: reset, update, new."""

    num_gates = 3

    @staticmethod
    def advance(inputs: Tensor, hidden: Tensor, state: State) -> tuple[State, State]:
        """As `LSTM.advance`, with (…, 3 × hidden_dim) and the state (hidden,)."""
        (reset, update, new), (reset_h, update_h, new_h) = inputs.chunk(3, -1), hidden.chunk(3, -1)
        reset, update = (reset + reset_h).sigmoid(), (update + update_h).sigmoid()
        new = (new + reset * new_h).tanh()
        return (new + update * (state[0] - new),), (reset, update, new, new_h, state[0])

    @staticmethod
    def retreat(gradient: State, saved: State) -> tuple[Tensor, Tensor, State]:
        """As `LSTM.retreat`."""
        reset, update, new, new_h, before = saved
        (for_hidden,) = gradient
        for_new = for_hidden * (1 - update) * (1 - new * new)
        for_update = for_hidden * (before - new) * update * (1 - update)
        for_reset = for_new * new_h * reset * (1 - reset)
        inputs = torch.cat([for_reset, for_update, for_new], -1)
        return inputs, torch.cat([for_reset, for_update, for_new * reset], -1), (for_hidden * update,)


Cell = type[LSTM] | type[GRU]
CELLS: dict[str, Cell] = {"lstm": LSTM, "gru": GRU}


def unroll(
    cell: Cell,
    extents: Sequence[tuple[int, int]],
    words: Tensor,
    keys: Tensor,
    regions: Tensor,
    state: State,
    from_state: tuple[Tensor, Tensor],
    from_context: Tensor,
    score: Tensor,
    checkpointed: bool,
) -> tuple[Tensor, Tensor, State]:
    """Runs the decoder over packed captions: at step t over `extents[t]` = (images, captions), all laid end to end.

    With s = W h + b, split into the query q, the gate g of the context and the hidden's gates: attention (Bahdanau et
    al. 2015, appendix A.1.2) weighs the regions by softmax(score · tanh(q + k)), g.sigmoid() scales their sum (Xu et
    al. 2015, section 4.2.1), and the cell advances with words + V context.

    Args:
        words: the words' share of the gates, (sum of images_t × captions_t, num_gates × hidden_dim).
        keys: `attention.exponential` of k (images, num_regions, attention_dim).
        regions: (images, num_regions, region_dim).
        state: before the first word, each (images, captions, hidden_dim).
        from_state: W (attention_dim + region_dim + num_gates × hidden_dim, hidden_dim) and b.
        from_context: V (num_gates × hidden_dim, region_dim).
        score: (attention_dim,).
        checkpointed: this runs under gradient checkpointing.

    Returns:
        Hidden states and gated contexts, packed as `words` are, and the state after the last step. All has their dtype,
        but for keys and score.
    """
    with torch.autocast(words.device.type, enabled=False):
        hiddens, gated, *last = _Unrolled.apply(
            cell, extents, checkpointed, words, keys, regions, *from_state, from_context, score, *state
        )
    return hiddens, gated, tuple(last)


class _Steps:
    """Views of packed values, step by step, and one buffer that all steps' distances share."""

    def __init__(self, extents: Sequence[tuple[int, int]], keys: Tensor) -> None:
        self.extents, self.keys = extents, keys
        sizes = [rows * columns for rows, columns in extents]
        self.starts = [sum(sizes[:step]) for step in range(len(sizes))]
        self.total = sum(sizes)
        self._buffer = keys.new_empty(max(sizes) * keys[0].numel())

    def at(self, packed: Tensor, step: int) -> Tensor:
        """(images_t × captions_t, dim), a view."""
        rows, columns = self.extents[step]
        return packed[self.starts[step] : self.starts[step] + rows * columns]

    def grid(self, packed: Tensor, step: int) -> Tensor:
        """(images_t, captions_t, dim), a view."""
        return self.at(packed, step).unflatten(0, self.extents[step])

    def distances(self, queries: Tensor) -> Tensor:
        """Of (images_t, captions_t, attention_dim) exponentials to the keys', valid until the next call."""
        rows, columns = queries.shape[:2]
        shape = (rows, columns, *self.keys.shape[1:])
        buffer = self._buffer[: rows * columns * self.keys[0].numel()].view(shape)
        return distances(queries, self.keys[:rows], out=buffer)


def _join(for_hidden: Tensor, later: State) -> State:
    """The gradient of a step's state: from its output, and from the next step, whose extents may be smaller."""
    joined = (for_hidden.clone(), *(torch.zeros_like(for_hidden) for _ in later[1:]))
    for own, more in zip(joined, later, strict=True):
        own[: more.shape[0], : more.shape[1]] += more
    return joined


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        extents: Sequence[tuple[int, int]],
        checkpointed: bool,
        words: Tensor,
        keys: Tensor,
        regions: Tensor,
        weight: Tensor,
        bias: Tensor,
        from_context: Tensor,
        score: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        steps = _Steps(extents, keys)
        before, projected = (words.new_empty(steps.total, size) for size in (weight.shape[1], weight.shape[0]))
        hiddens, gated = (words.new_empty(steps.total, size) for size in (weight.shape[1], regions.shape[-1]))
        widths = [keys.shape[-1], regions.shape[-1], words.shape[-1]]
        kept: list[Tensor] = []
        for step, (rows, columns) in enumerate(extents):
            state = tuple(part[:rows, :columns] for part in state)
            steps.grid(before, step).copy_(state[0])
            torch.addmm(bias, steps.at(before, step), weight.T, out=steps.at(projected, step))
            query, gate, hidden_gates = steps.grid(projected, step).split(widths, -1)
            queries = exponential(query)
            attention_weights = (steps.distances(queries) @ score).mul_(-2).softmax(-1)
            context = attention_weights.to(words.dtype) @ regions[:rows]
            torch.mul(context, gate.sigmoid_(), out=steps.grid(gated, step))
            gates = torch.addmm(steps.at(words, step), steps.at(gated, step), from_context.T)
            state, saved = cell.advance(gates.unflatten(0, (rows, columns)), hidden_gates, state)
            steps.grid(hiddens, step).copy_(state[0])
            kept += (queries, attention_weights, context, *saved)
        ctx.cell, ctx.extents, ctx.kept = cell, extents, [] if checkpointed else kept
        # Gradient checkpointing makes again what is saved here; only what lies elsewhere can be freed as it goes.
        seen = kept if checkpointed else ()
        ctx.save_for_backward(keys, regions, weight, from_context, score, before, projected, gated, *seen)
        return hiddens, gated, *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_hiddens: Tensor, for_gated: Tensor, *later: Tensor) -> tuple[Tensor | None, ...]:
        keys, regions, weight, from_context, score, before, projected, gated, *kept = ctx.saved_tensors
        kept = kept or ctx.kept
        num_kept = len(kept) // len(ctx.extents)
        steps = _Steps(ctx.extents, keys)
        widths = [keys.shape[-1], regions.shape[-1], from_context.shape[0]]
        for_projected, for_words = torch.empty_like(projected), projected.new_empty(steps.total, widths[2])
        for_keys, for_score = torch.zeros_like(keys), torch.zeros_like(score)
        # Padded, so that the regions' gradient is one product over all steps as well.
        layout = (len(regions), len(ctx.extents), ctx.extents[0][1])
        all_weights, for_contexts = (regions.new_zeros(*layout, regions.shape[d]) for d in (1, 2))
        for step in reversed(range(len(ctx.extents))):
            rows, columns = ctx.extents[step]
            queries, attention_weights, context, *saved = kept[-num_kept:]
            del kept[-num_kept:]
            gate = steps.grid(projected, step)[..., widths[0] : -widths[2]]
            inputs, hidden, passed = ctx.cell.retreat(_join(steps.grid(for_hiddens, step), later), tuple(saved))
            for_query, for_gate, for_hidden_gates = steps.grid(for_projected, step).split(widths, -1)
            steps.grid(for_words, step).copy_(inputs)
            for_hidden_gates.copy_(hidden)
            total = torch.addmm(steps.at(for_gated, step), steps.at(for_words, step), from_context)
            total = total.unflatten(0, (rows, columns))
            for_context = total * gate
            torch.mul(for_context * context, 1 - gate, out=for_gate)
            for_contexts[:rows, step, :columns] = for_context
            all_weights[:rows, step, :columns] = attention_weights
            # In the keys' precision, for its terms cancel.
            weighted = attention_weights * (for_context @ regions[:rows].transpose(1, 2)).to(keys.dtype)
            for_scores = weighted - attention_weights * weighted.sum(-1, keepdim=True)
            distance = steps.distances(queries)
            for_score.sub_(for_scores.reshape(-1) @ distance.flatten(0, 2), alpha=2)
            slope = slopes(distance)
            for_query.copy_((for_scores[:, :, None] @ slope).squeeze(2).mul_(4 * score))
            for caption in range(columns):
                for_keys[:rows].addcmul_(slope[:, caption], for_scores[:, caption, :, None])
            through = steps.at(for_projected, step) @ weight
            later = (through.unflatten(0, (rows, columns)).add_(passed[0]), *passed[1:])
        for_regions = all_weights.flatten(1, 2).transpose(1, 2) @ for_contexts.flatten(1, 2)
        for_weight, for_bias = for_projected.T @ before, for_projected.sum(0)
        return (
            *(None, None, None, for_words, for_keys.mul_(2 * score).div_(keys), for_regions, for_weight, for_bias),
            *(for_words.T @ gated, for_score, *later),
        )

"""How a network computes: where, in which number format, with which memory, and fused for a CPU."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """The GPU where there is one; of several, this process's own (torchrun numbers the processes of a host)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware multiplies it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), fp16 on older
    GPUs, else fp32. Other CPUs emulate bf16, slower than fp32."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # torch has no public question for this; where it loses the private one, fp32 is right, only slower.
    asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if any(ask is not None and ask() for ask in asks) else torch.float32


def describe_arithmetic(precision: str) -> list[object]:
    """What the last digits of a result depend on besides software: device, number format, threads."""
    device = choose_device()
    return [device.type, str(choose_precision(precision, device)), torch.get_num_threads()]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision in `dtype`; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_memory() -> None:
    """Lets this process keep freed memory for its next tensors; glibc only, elsewhere no-op.

    By default glibc returns every large tensor (32 MB and more) to the kernel when it is freed, and the next one is
    zeroed page by page: two thirds of the time of a network on images. Threads' own heaps end at 64 MB and are
    returned, too, so threads share the main one: those that start after this call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


@cache
def can_fuse(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch and this processor have what `fuse` needs: oneDNN, in this dtype. It tries."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    try:
        fuse(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.zeros(1, 3, 8, 8, dtype=dtype))
    except RuntimeError:  # "needs avx512_fp16"
        return False
    return True


def fuse(network: nn.Module, example: Tensor) -> nn.Module:
    """A network for inference on a CPU: batch normalisation folded into convolutions, activations in them.

    Args:
        network: in evaluation mode, of a form that torch.fx can trace; it is used up. Its convolutions are torch's own,
            or a subclass whose `static_padding` does nothing.
        example: an input, of the dtype to compute in. Weights are laid out for its shape; others are right, but slower.

    Raises:
        ValueError: a convolution that computes something else, or is used more than once; or a network with layer
            normalisation, as transformers have: there is little to fuse, and in bfloat16 it must stay in float32.
    """
    assert not network.training
    if any(isinstance(module, nn.LayerNorm) for module in network.modules()):
        raise ValueError("layer normalisation cannot be fused")
    graph = fx.GraphModule(network, _Tracer().trace(network))
    _check_convolutions(graph)
    for node, convolution, following, norm in _followed(graph, (nn.BatchNorm2d,)):
        _replace(graph, node, following, fuse_conv_bn_eval(convolution, norm))
    for node, convolution, following, activation in _followed(graph, tuple(_FusedConvolution.ACTIVATIONS)):
        _replace(graph, node, following, _FusedConvolution(convolution, type(activation), example.dtype))
    for name, module in list(graph.named_modules()):
        if isinstance(module, nn.Conv2d):
            graph.set_submodule(name, _FusedConvolution(module, nn.Identity, example.dtype))
    graph.recompile()
    graph.to(example.dtype)
    with torch.inference_mode():
        graph(example)
    return graph


def _check_convolutions(graph: fx.GraphModule) -> None:
    uses = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    for name, module in graph.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        unpadded = hasattr(module, "static_padding") and not isinstance(module.static_padding, nn.ZeroPad2d)
        plain = unpadded or type(module).forward is nn.Conv2d.forward
        if not plain or module.padding_mode != "zeros" or isinstance(module.padding, str) or uses[name] > 1:
            raise ValueError(f"{name}: {module} cannot be fused")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)


def _followed(graph: fx.GraphModule, kinds: tuple[type, ...]) -> Iterator[tuple[fx.Node, nn.Conv2d, fx.Node, Any]]:
    """Convolutions whose output goes into one module of these kinds and nowhere else, each with that module."""
    for node in list(graph.graph.nodes):
        users = list(node.users)
        if len(users) == 1 and isinstance(convolution := _module(graph, node), nn.Conv2d):
            if isinstance(module := _module(graph, users[0]), kinds):
                yield node, convolution, users[0], module


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """What a node computes, if it is a module or could be one."""
    if node.op == "call_function" and node.target is nn.functional.relu:
        return nn.ReLU()
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _replace(graph: fx.GraphModule, node: fx.Node, following: fx.Node, module: nn.Module) -> None:
    """Puts `module` in place of a convolution and what follows it."""
    graph.set_submodule(str(node.target), module)
    following.replace_all_uses_with(node)
    graph.graph.erase_node(following)


class _FusedConvolution(nn.Module):
    """A convolution with its activation: its output is written once. Weights, no parameters, keep their dtype."""

    ACTIVATIONS: dict[type, tuple[str, list[float]]] = {
        nn.Identity: ("none", []),
        nn.ReLU: ("relu", []),
        nn.ReLU6: ("hardtanh", [0.0, 6.0]),
        nn.SiLU: ("swish", []),
        nn.Hardswish: ("hardswish", []),
    }

    def __init__(self, convolution: nn.Conv2d, activation: type, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.packed = convolution.weight.detach().to(dtype), False
        self.bias = None if convolution.bias is None else convolution.bias.detach().float()  # more exact, and no slower
        sizes = (convolution.padding, convolution.stride, convolution.dilation)
        self.sizes, self.groups = [list(size) for size in sizes], convolution.groups
        self.activation = self.ACTIVATIONS[activation]

    def forward(self, images: Tensor) -> Tensor:
        # Operators that torch.compile emits, without its compiler.
        if not self.packed:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self.weight = pack(self.weight, *self.sizes, self.groups, list(images.shape))
            self.packed = True
        product = torch.ops.mkldnn._convolution_pointwise
        return product(images, self.weight, self.bias, *self.sizes, self.groups, *self.activation, None)

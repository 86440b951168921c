"""Where a network computes, in which number format, and the autocast region for it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

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

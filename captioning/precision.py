"""Where a network computes, in which number format, and the autocast region for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision in `dtype`; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

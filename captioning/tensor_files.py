"""A tree of tensors and plain values as two files: tensors in safetensors' format, the rest as JSON. No pickle.

The tensors' file is laid out in one buffer, which is reused from one save to the next: to save means to copy tensors
into memory that another process then writes out.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

MARK = "__tensor__"
ALIGNMENT = 64
"""Of the first tensor; the others follow by falling item size, so each is aligned to its own."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def split_tree(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Takes the tensors out of nested dicts and lists.

    Returns:
        The tree as JSON can write it, with `{"__tensor__": name}` in the tensors' places, and the tensors by name.
    """
    if isinstance(tree, Tensor):
        return {MARK: prefix}, {prefix: tree}
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return tree, {}
    parts = {key: split_tree(value, f"{prefix}/{key}" if prefix else key) for key, value in items}
    tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
    plain = {key: value for key, (value, _) in parts.items()}
    return (plain if isinstance(tree, dict) else list(plain.values())), tensors


def join_tree(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of `split_tree`; keys of dicts come back as strings, tuples as lists."""
    if isinstance(plain, dict):
        if set(plain) == {MARK}:
            return tensors[plain[MARK]]
        return {key: join_tree(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [join_tree(value, tensors) for value in plain]
    return plain


class SharedBuffer:
    """Memory that a child process can read: a file without a name, so that no kill leaves it behind."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("capstan-checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self.memory: mmap.mmap | None = None
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> Tensor:
        """At least so many bytes, as a uint8 tensor; pinned where there is a GPU, so that copies from it are fast."""
        if num_bytes > self.num_bytes or self.memory is None:
            os.ftruncate(self.descriptor, num_bytes)
            self.memory, self.num_bytes = mmap.mmap(self.descriptor, num_bytes), num_bytes
            self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
            if torch.cuda.is_available():
                torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0)
        return self.bytes

    def close(self) -> None:
        """The memory goes when the writer has let go of it, too."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def lay_out(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """safetensors' header, each tensor's first byte in the file, and the file's length."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries, starts, position = {}, {}, 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        starts[name], position = position, end
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + position


def copy_tensors(tensors: dict[str, Tensor], buffer: SharedBuffer) -> int:
    """Lays the file out in the buffer and returns its length. On return the tensors may change."""
    header, starts, num_bytes = lay_out(tensors)
    memory = buffer.reserve(num_bytes)
    memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    on_gpu = False
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        end = starts[name] + tensor.numel() * tensor.element_size()
        if tensor.numel():
            memory[starts[name] : end].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        on_gpu |= tensor.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    return num_bytes


def parse_tensors(content: bytes) -> dict[str, Tensor]:
    """Tensors by name from a verified file's bytes; they share its memory and are only for copying from."""
    from safetensors.torch import load

    return load(content)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 of named tensors on a CPU: names, dtypes, shapes, and bytes, in the order of names."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Weights of encoders: files that may be hostile, and downloads from torchvision's hub that are checked by digest."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import xxhash
from torch import Tensor, nn

from captioning import storage, transfer
from captioning.errors import CapstanError, DamagedError

MAX_HUB_BYTES = 4 << 30  # torchvision's largest, regnet_y_128gf, has 2.6e9 bytes
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under these names training programs keep the weights, beside the epoch or the optimizer."""
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def load_state_dict(path: Path, param: str) -> dict[str, Tensor]:
    """Reads weights that may be hostile: safetensors (by the file's suffix), or a torch file without any pickled code.

    Names lose what DistributedDataParallel and torch.compile put before them. A checkpoint that holds its weights as
    `state_dict`, `model_state_dict` or `model` is accepted, if there are no other objects than tensors, numbers and
    strings in it.

    Raises:
        CapstanError: missing, truncated, or holding anything but tensors; names the file and the param.
    """
    if not path.is_file():
        raise CapstanError(f"{path} is missing: {param} names it. Put the weights there or change the param.")
    try:
        state = _read(path)
    except Exception as error:  # torch raises many types on hostile bytes
        raise CapstanError(
            f"{path} ({param}) cannot be read as weights: it is truncated, or holds more than tensors "
            f"({' '.join(str(error).split()) or type(error).__name__:.200}). Nothing in it was run. Fetch it again, or "
            "save the weights alone: `safetensors.torch.save_file(model.state_dict(), path)`."
        ) from error
    state = _unwrap(state)
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise CapstanError(f"{path} ({param}) is not a state dict: expected a mapping from names to tensors")
    if wrong := [name for name, value in state.items() if not _is_plain(value)]:
        raise CapstanError(
            f"{path} ({param}) is not a state dict: {_some(wrong)} among {len(state)} names are not plain tensors"
        )
    start = _shared_prefix(list(state))
    return {name[start:]: value.detach() for name, value in state.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        _refuse_bombs(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _refuse_bombs(path: Path) -> None:
    """torch stores without compression but reads with: a megabyte can ask for a gigabyte of memory."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    if declared > path.stat().st_size:
        raise ValueError(f"compressed: {declared:,} bytes in a file of {path.stat().st_size:,}")


def _unwrap(state: Any) -> Any:
    for _ in range(3):  # not for ever: a hostile mapping may hold itself
        inner = [state[name] for name in _WRAPPERS if name in state] if isinstance(state, dict) else []
        state = next((value for value in inner if isinstance(value, dict)), state)
    return state


def _is_plain(value: Any) -> bool:
    """Whether a value is numbers in memory: no sparse, quantised, nested or meta tensor, no subclass."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
    )


def _shared_prefix(names: list[str]) -> int:
    """How many characters of prefixes all names begin with."""
    start = 0
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p, start) for name in names)), ""):
        start += len(prefix)
    return start


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name:.80}" for name in names[:2])
    return f"{shown}, …" if len(names) > 2 else shown


def load_into(network: nn.Module, state: dict[str, Tensor], path: str, param: str, head: str | tuple[str, ...]) -> None:
    """Loads all but the classifier head; anything else that does not fit is the user's wrong file.

    What an encoder gives does not depend on its classifier, so weights of any number of classes, or of none, are good.
    densenet's names of 2017 are understood. The network stays as it was where an error is raised.

    Args:
        head: what the names of the classifier's tensors begin with.

    Raises:
        CapstanError: another architecture (both sides of the first mismatch are shown), or values that are not finite.
    """
    own = network.state_dict()
    state = {_new_name(name, own): value for name, value in state.items() if not name.startswith(head)}
    missing = [n for n in own if n not in state and not n.startswith(head) and "num_batches_tracked" not in n]
    extra = [n for n in state if n not in own]
    unlike = [n for n, v in state.items() if n in own and _kind(v) != _kind(own[n])]
    if missing or extra or unlike:
        first = f" ({unlike[0]}: {_kind(state[unlike[0]])}, expected {_kind(own[unlike[0]])})" if unlike else ""
        raise CapstanError(
            f"{path} ({param}) holds another architecture: {len(missing)} tensors missing [{_some(missing)}], "
            f"{len(extra)} unknown [{_some(extra)}], {len(unlike)} of another shape or type{first}"
        )
    # As they will be: a number that float64 can hold may be too large for float32.
    state = {name: value.to(own[name].dtype) for name, value in state.items()}
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise CapstanError(
            f"{path} ({param}): {len(bad)} tensors hold numbers that are not finite [{_some(bad)}]: the training that "
            "made them diverged, or the file is damaged. Use other weights."
        )
    network.load_state_dict(state, strict=False)


def _new_name(name: str, own: dict[str, Tensor]) -> str:
    """`…denselayer1.norm.1.weight` is `…denselayer1.norm1.weight` today."""
    new = _OLD_DENSENET.sub(r"\1\2", name)
    return new if new in own else name


def _kind(value: Tensor) -> str:
    kind = "complex" if value.is_complex() else "float" if value.is_floating_point() else "integer"
    return f"{kind} {tuple(value.shape)}"


def hub_file(url: str, param: str, *, max_bytes: int = MAX_HUB_BYTES) -> Path:
    """Downloads hub weights once, into torch's own cache, and gives their path; a broken transfer goes on.

    The name of the file ends in the beginning of its sha256, which is checked on arrival. At each use the bytes are
    compared with the xxh3-128 noted beside the file (50 times as fast as sha256, and no rotten byte passes); a damaged
    file is set aside and fetched again. Of several processes one fetches while the others wait.

    Raises:
        CapstanError: not to be had, longer than `max_bytes`, the digest differs, or the cache cannot be written; names
            URL, file and param.
    """
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    pin = _DIGEST_IN_NAME.search(target.name)
    if pin is None:  # of torchvision's, four quantised networks alone
        raise CapstanError(
            f"{url} has no digest in its name, so what comes from there cannot be checked: download it yourself and "
            f"set {param} to its path"
        )
    try:
        if not _is_whole(target, pin[1]):  # without the lock first: a cache may be shared and read-only
            _fetch_once(url, target, pin[1], max_bytes)
    except (CapstanError, OSError) as error:
        raise CapstanError(
            f"{param}: the hub's weights are not to be had. {error} Otherwise download {url} elsewhere and save it as "
            f"{target}, or set {param} to its path; `random` is an untrained encoder."
        ) from error
    return target


def _fetch_once(url: str, target: Path, pin: str, max_bytes: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(target):
        if _is_whole(target, pin):
            return
        if target.exists():
            storage.set_aside(target)
        transfer.download(url, target, pin, max_bytes=max_bytes, by_hand="")
        target.with_name(f"{target.name}.sha256").unlink(missing_ok=True)  # our note knows it, too
        _write_note(target, _digests(target))


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """A lock that a killed process lets go. The lock's file stays: who deletes it could delete another's lock."""
    with target.with_name(f"{target.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which fetches {target.name}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_whole(target: Path, pin: str) -> bool:
    """Whether the file is there and has the pinned bytes; notes its digests where nobody has."""
    try:
        note = _read_note(target)
        if str(note.get("sha256")).startswith(pin) and note.get("xxh3_128") == storage.digest_file(target):
            return True
        found = _digests(target)
    except (FileNotFoundError, DamagedError):
        return False
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False  # a bad sector
    if not found["sha256"].startswith(pin):
        return False
    with suppress(OSError):  # a read-only cache: sha256 every time
        _write_note(target, found)
    return True


def _digests(path: Path) -> dict[str, str]:
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(storage.CHUNK):
            sha256.update(chunk)
            xxh3.update(chunk)
    return {"sha256": sha256.hexdigest(), "xxh3_128": xxh3.hexdigest()}


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _write_note(target: Path, digests: dict[str, str]) -> None:
    storage.write_json(_note(target), digests)


def _read_note(target: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note(target).read_text("utf-8"))
    except (OSError, ValueError):
        note = None
    return note if isinstance(note, dict) else {}

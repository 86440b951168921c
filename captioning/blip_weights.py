"""Where BLIP's pretrained weights come from: a local folder, or a repository on the Hugging Face hub at one commit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from captioning import storage
from captioning.errors import CapstanError, brief

TRAIN = "train"
"""The value of blip.weights that asks for the small BLIP trained here."""

HUB_FILES = ["*.json", "*.txt", "model*.safetensors"]
"""What is taken from a hub repository: no code, no pickles, no other frameworks' weights."""


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that `blip.load_pretrained` may read."""
    return sorted(path for pattern in HUB_FILES for path in folder.glob(pattern))


def find_weights(weights: str) -> Path:
    """The local folder of that name, else the hub repository's files, downloaded unless they are in its cache.

    What comes from the cache is compared with the digests that the hub gave; a damaged file is set aside there and
    fetched again.

    Args:
        weights: a folder, or `<owner>/<name>` or `<owner>/<name>@<revision>` on the hub; the revision is a commit, a
            tag or a branch. A commit alone means the same files for ever, so without one it is printed.

    Raises:
        CapstanError: no such folder, and not to be had from the hub; or damaged twice.
    """
    if Path(weights).is_dir():
        return Path(weights)
    repository, _, revision = weights.partition("@")
    folder = _fetch(weights, repository, revision)
    if damaged := _damaged(folder):
        for blob in damaged:
            storage.set_aside(blob)
        folder = _fetch(weights, repository, revision)
        if damaged := _damaged(folder):
            raise CapstanError(
                f"blip.weights: {damaged[0]} does not have its digest, fetched twice: is the disk whole?"
            )
    if folder.name != revision:
        print(
            f"blip.weights: {repository} is at commit {folder.name}. To keep to it, set {repository}@{folder.name}.",
            flush=True,
        )
    return folder


def _fetch(weights: str, repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        at = f" --revision {revision}" if revision else ""
        raise CapstanError(
            f"blip.weights: {weights} is neither a local folder nor to be had from the Hugging Face hub "
            f"({brief(error)}). Where there is a network, fetch it into the hub's cache with `hf download "
            f"{repository}{at}` (HF_HOME says where that is), or copy the repository's files into a folder and name "
            f"that folder in blip.weights; `{TRAIN}` trains a small BLIP here instead."
        ) from error


def _damaged(folder: Path) -> list[Path]:
    """Files of the hub's cache whose content is not what their names say."""
    blobs = [path.resolve() for path in weight_files(folder) if path.is_symlink()]
    return [blob for blob in blobs if blob.name != _digest(blob)]


def _digest(blob: Path) -> str:
    """As the hub names files: sha256 for those in its large file storage, git's name for the others."""
    if len(blob.name) == hashlib.sha256().digest_size * 2:
        return storage.sha256_file(blob)
    content = blob.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

"""BLIP's weights from a hub on loopback, through the hub's own client."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Server, body, serve, status

FILES = {
    "config.json": b'{"model_type": "blip"}',
    "vocab.txt": b"a\nred\n",
    "model.safetensors": bytes(range(256)) * 40,
}
REFUSED = {"pytorch_model.bin": b"a pickle", "modeling_blip.py": b"print('code')"}
REPOSITORY, OLD, NEW = "some/blip-base", "0" * 39 + "1", "0" * 39 + "2"


def etag(name: str, data: bytes) -> str:
    """As the hub gives it: sha256 for large files, git's name of the blob for others."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def add_commit(server: Server, commit: str, *names: str, files: dict[str, bytes] = FILES) -> None:
    """A commit of the repository, under its own name and these."""
    files = files | REFUSED
    about = {"id": REPOSITORY, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": len(data), "oid": etag("", data)} for name, data in files.items()]
    api = f"/api/models/{REPOSITORY}"
    for name in (commit, *names):
        server.add(f"{api}/revision/{name}", body(json.dumps(about).encode(), "application/json"))
    server.add(f"{api}/tree/{commit}?recursive=true&expand=false", body(json.dumps(tree).encode(), "application/json"))
    for name, data in files.items():
        headers = {"ETag": f'"{etag(name, data)}"', "X-Repo-Commit": commit}
        server.add(f"/{REPOSITORY}/resolve/{commit}/{name}", body(data, **headers))


@pytest.fixture
def hub() -> Iterator[Server]:
    with serve() as server:
        add_commit(server, OLD, "v1.0")
        add_commit(server, NEW, "main", files=FILES | {"vocab.txt": b"a\nblue\n"})
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def find(
    hub: Server | None, home: Path, weights: str, code: int = 0, offline: bool = False
) -> tuple[dict[str, bytes], str]:
    """The files that `find_weights` gives, in a process of its own (the client reads its settings at import), and what
    it printed. `hub` None: a port that refuses connections."""
    program = (
        "import sys, time; time.sleep = lambda seconds: None; from captioning.blip_weights import find_weights; "
        "print(find_weights(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound, not listening
    endpoint = hub.url("") if hub else f"http://127.0.0.1:{closed.getsockname()[1]}"
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-W", "ignore", "-c", program, weights]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home.parent)
    closed.close()
    assert answer.returncode == code, answer.stderr
    if code:
        return {}, answer.stderr
    *printed, folder = answer.stdout.splitlines()
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, "\n".join(printed)


def test_a_name_gives_the_newest_commit_and_says_how_to_keep_to_it(hub: Server, home: Path) -> None:
    files, printed = find(hub, home, REPOSITORY)
    assert files == FILES | {"vocab.txt": b"a\nblue\n"}
    assert printed == f"blip.weights: {REPOSITORY} is at commit {NEW}. To keep to it, set {REPOSITORY}@{NEW}."


def test_a_commit_is_kept_to(hub: Server, home: Path) -> None:
    assert find(hub, home, f"{REPOSITORY}@{OLD}") == (FILES, "")


def test_a_tag_is_named_with_its_commit(hub: Server, home: Path) -> None:
    files, printed = find(hub, home, f"{REPOSITORY}@v1.0")
    assert files == FILES and OLD in printed


def test_what_is_cached_needs_no_hub(hub: Server, home: Path) -> None:
    find(hub, home, f"{REPOSITORY}@{OLD}")
    hub.answers.clear()
    assert find(hub, home, f"{REPOSITORY}@{OLD}") == (FILES, "")


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_a_file_damaged_in_the_cache_is_set_aside_and_fetched_again(hub: Server, home: Path, name: str) -> None:
    find(hub, home, f"{REPOSITORY}@{OLD}")
    (blob,) = home.rglob(etag(name, FILES[name]))
    blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
    files, printed = find(hub, home, f"{REPOSITORY}@{OLD}")
    assert files == FILES
    assert f"{blob} was damaged" in printed and blob.with_name(f"{blob.name}.corrupt").exists()


def test_what_is_damaged_in_the_cache_is_not_used_without_a_hub(hub: Server, home: Path) -> None:
    find(hub, home, f"{REPOSITORY}@{OLD}")
    (blob,) = home.rglob(etag("model.safetensors", FILES["model.safetensors"]))
    blob.write_bytes(bytes(len(FILES["model.safetensors"])))
    for _ in range(2):
        _, error = find(hub, home, f"{REPOSITORY}@{OLD}", code=1, offline=True)
        assert f"CapstanError: blip.weights: {REPOSITORY}@{OLD} is neither" in error


def test_a_hub_that_gives_other_bytes_than_their_digest_is_not_believed(hub: Server, home: Path) -> None:
    name = "model.safetensors"
    headers = {"ETag": f'"{etag(name, FILES[name])}"', "X-Repo-Commit": OLD}
    hub.add(f"/{REPOSITORY}/resolve/{OLD}/{name}", body(FILES[name][::-1], **headers))
    _, error = find(hub, home, f"{REPOSITORY}@{OLD}", code=1)
    assert "does not have its digest, fetched twice" in error


def test_a_revision_that_is_not_there_is_an_error_that_names_it(hub: Server, home: Path) -> None:
    hub.add(f"/api/models/{REPOSITORY}/revision/v9", status(404, X_Error_Code="RevisionNotFound"))
    _, error = find(hub, home, f"{REPOSITORY}@v9", code=1)
    assert "blip.weights: some/blip-base@v9 is neither" in error and f"hf download {REPOSITORY} --revision v9" in error


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(home: Path) -> None:
    _, error = find(None, home, REPOSITORY, code=1)
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"captioning.errors.CapstanError: blip.weights: {REPOSITORY} is neither a local folder")
    assert f"hf download {REPOSITORY}`" in last and "HF_HOME" in last and "`train` trains a small BLIP" in last

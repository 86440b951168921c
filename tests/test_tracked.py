from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning import storage, tracked
from captioning.errors import CapstanError, DamagedError

CONTENT = b'[{"image_id": "a", "caption": "a red circle"}]\n'
PATH = Path("data/captions/x.json")


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "score@x")
    PATH.parent.mkdir(parents=True)
    PATH.write_bytes(CONTENT)
    digest = hashlib.md5(CONTENT).hexdigest()
    out = f"    - path: {PATH}\n      hash: md5\n      md5: {digest}\n      size: {len(CONTENT)}\n"
    Path("dvc.lock").write_text(f"schema: '2.0'\nstages:\n  generate@x:\n    cmd: x\n    outs:\n{out}")
    tracked._recorded.cache_clear()
    return tmp_path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 8 * len(CONTENT) - 1))
def test_every_flipped_bit_of_an_earlier_stages_file_is_found(bit: int) -> None:
    assert tracked.require(PATH, "generate@x") == PATH
    damaged = bytearray(CONTENT)
    damaged[bit // 8] ^= 1 << bit % 8
    PATH.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"x.json has other bytes than dvc.lock recorded .*Run `dvc repro` again"):
        tracked.require(PATH, "generate@x")
    aside = PATH.with_name("x.json.corrupt")
    assert aside.read_bytes() == damaged and not PATH.exists()  # so that DVC restores it
    PATH.write_bytes(CONTENT)


@pytest.mark.parametrize("lock", [None, "", "stages: {}\n", "{"])
def test_without_a_record_the_file_counts_as_it_is(lock: str | None) -> None:
    Path("dvc.lock").unlink() if lock is None else Path("dvc.lock").write_text(lock)
    assert tracked.require(PATH, "generate@x") == PATH


def test_by_hand_a_file_may_differ(monkeypatch) -> None:
    monkeypatch.delenv("DVC_STAGE")
    PATH.write_bytes(b"[]")
    assert tracked.require(PATH, "generate@x") == PATH and PATH.exists()


def test_a_damaged_folder_is_set_aside_whole(capsys) -> None:
    folder = Path("data/models/x")
    with storage.commit(folder, {}) as files:
        files.write("a", b"content")
    (folder / "a").chmod(0o444)
    manifest = storage.read_manifest(folder)
    with tracked.read_verified(folder):
        storage.read_committed(folder, "a", manifest)
    (folder / "a").chmod(0o644)
    (folder / "a").write_bytes(b"comtent")
    (folder / "a").chmod(0o444)
    with pytest.raises(DamagedError, match=r"x/a is damaged.*Run `dvc repro` again"):
        with tracked.read_verified(folder):
            storage.read_committed(folder, "a", manifest)
    aside = folder.with_name("x.corrupt")
    assert not folder.exists() and (aside / "a").stat().st_mode & 0o200  # so that DVC looks at its cache again


def test_a_missing_file_names_its_stage() -> None:
    PATH.unlink()
    with pytest.raises(CapstanError, match="dvc repro generate@x"):
        tracked.require(PATH, "generate@x")

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning import paths, storage
from captioning.errors import CapstanError, DamagedError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path) -> None:
    target = tmp_path / "a.json"
    storage.write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), storage.atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert storage.read_json(target) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_json_refuses_what_is_not_json(tmp_path) -> None:
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_publish_replaces_a_folder_whole(tmp_path) -> None:
    built, target = tmp_path / "built", tmp_path / "out" / "x"
    for folder, name in ((built, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / name).write_text(name)
    storage.publish(built, target)
    assert [p.name for p in target.iterdir()] == ["new"] and built.exists()


def test_publish_across_filesystems(tmp_path, monkeypatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    built = tmp_path / "built"
    built.mkdir()
    (built / "a").write_text("a")
    storage.publish(built, tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert not os.path.samefile(built / "a", tmp_path / "out" / "a")


def test_digest_of_a_tree_sees_names_and_contents(tmp_path) -> None:
    (tmp_path / "a").write_text("1")
    first = storage.digest_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = storage.digest_tree(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, storage.digest_tree(tmp_path)}) == 3


@pytest.mark.parametrize("make", [lambda p: None, Path.touch, Path.mkdir])
def test_missing_and_empty_inputs_name_the_stage(tmp_path, make) -> None:
    make(tmp_path / "shards")
    with pytest.raises(CapstanError, match=r"missing or empty. Make it with `dvc repro download`"):
        paths.require(tmp_path / "shards", "download")


def test_publish_keeps_the_work_and_takes_the_named_files_alone(tmp_path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    for name in ("a", "b", "c.corrupt"):
        (built / name).write_text(name)
    storage.publish(built, tmp_path / "out", ["a", "b"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert len(list(built.iterdir())) == 3
    assert os.path.samefile(built / "a", tmp_path / "out" / "a")  # no space is spent


FILES = st.dictionaries(st.sampled_from(["a", "b.json", "c.bin"]), st.binary(max_size=50), min_size=1)


@given(FILES, st.randoms(use_true_random=False))
def test_any_changed_bit_of_a_committed_folder_is_found(files: dict[str, bytes], draw) -> None:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "step-1"
        with storage.commit(target, {"step": 1}) as work:
            for file, content in files.items():
                work.write(file, content)
        assert storage.verify(target) == sum(map(len, files.values()))
        manifest = storage.read_manifest(target)
        assert manifest["about"] == {"step": 1}
        assert {file: storage.read_committed(target, file, manifest) for file in files} == files
        victim = target / draw.choice([file for file, content in files.items() if content] + [storage.MANIFEST])
        content = bytearray(victim.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(content)
        same = victim.name == storage.MANIFEST and _tree(content) == manifest
        if not same:  # white space between JSON's tokens means nothing
            with pytest.raises(DamagedError):
                storage.verify(target)


def _tree(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize("harm", ["delete", "truncate", "stray", "manifest"])
def test_damaged_folders_are_refused(tmp_path, harm: str) -> None:
    target = tmp_path / "x"
    with storage.commit(target, {}) as work:
        work.write("a", b"content")
    if harm == "delete":
        (target / "a").unlink()
    elif harm == "truncate":
        (target / "a").write_bytes(b"conten")
    elif harm == "stray":
        (target / "b").touch()
    else:
        (target / storage.MANIFEST).unlink()
    with pytest.raises(DamagedError, match="x"):
        storage.verify(target)


def test_a_failed_commit_leaves_the_old_folder_and_nothing_else(tmp_path) -> None:
    target = tmp_path / "x"
    with storage.commit(target, {}) as work:
        work.write("a", b"old")
    with pytest.raises(RuntimeError), storage.commit(target, {}) as work:
        work.write("a", b"new")
        raise RuntimeError
    assert (target / "a").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


ROWS = st.lists(
    st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.lists(st.text(max_size=3))), max_size=4
)


@given(ROWS, st.randoms(use_true_random=False))
def test_parts_come_back_exactly_or_are_set_aside(rows: list[object], draw) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "000.jsonl"
        assert storage.read_part(path, "x") is None
        storage.write_part(path, rows, "x")
        assert storage.read_part(path, "x") == rows
        assert storage.read_part(path, "y") is None and path.exists()  # another run's: made anew, not damaged
        content = bytearray(path.read_bytes())
        if draw.random() < 0.5:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            content = content[: draw.randrange(len(content))]
        path.write_bytes(content)
        assert storage.read_part(path, "x") is None
        assert not path.exists() and path.with_name("000.jsonl.corrupt").exists()

from __future__ import annotations

import os
from pathlib import Path

import pytest

from captioning import paths, storage
from captioning.errors import CapstanError


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
    assert [p.name for p in target.iterdir()] == ["new"] and not built.exists()


def test_publish_across_filesystems(tmp_path, monkeypatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == "built":
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    built = tmp_path / "built"
    built.mkdir()
    (built / "a").write_text("a")
    storage.publish(built, tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "a" and not built.exists()


def test_digest_of_a_tree_sees_names_and_contents(tmp_path) -> None:
    (tmp_path / "a").write_text("1")
    first = storage.digest_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = storage.digest_tree(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, storage.digest_tree(tmp_path)}) == 3


def test_fingerprints_follow_params_inputs_and_versions(tmp_path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    names = {
        storage.fingerprint("s", {"a": 1}, [file]),
        storage.fingerprint("t", {"a": 1}, [file]),
        storage.fingerprint("s", {"a": 2}, [file]),
        storage.fingerprint("s", {"a": 1}, [file], ["numpy"]),
    }
    assert storage.fingerprint("s", {"a": 1}, [file]) in names
    file.write_text("2")
    assert len(names | {storage.fingerprint("s", {"a": 1}, [file])}) == 5


@pytest.mark.parametrize("make", [lambda p: None, Path.touch, Path.mkdir])
def test_missing_and_empty_inputs_name_the_stage(tmp_path, make) -> None:
    make(tmp_path / "shards")
    with pytest.raises(CapstanError, match=r"missing or empty. Make it with `dvc repro download`"):
        paths.require(tmp_path / "shards", "download")


def test_work_lies_under_the_main_repository(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert storage.work_folder("train", "abc") == tmp_path / ".work" / "train" / "abc"

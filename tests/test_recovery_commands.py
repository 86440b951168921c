from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_checkpoints import settings, state

from captioning import cli, storage, work
from captioning.checkpoints import Checkpointer
from captioning.recovery_commands import heal

GOOD = "schema: '2.0'\nstages:\n  prepare:\n    cmd: x\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for command in (["init", "-q"], ["add", "-A"]):
        (tmp_path / "dvc.lock").write_text(GOOD)
        subprocess.run(["git", *command], check=True)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("content", ["", '{"a": {', "[]"])
def test_a_lock_that_dvc_would_refuse_is_removed(repository: Path, content: str) -> None:
    lock = repository / ".dvc/tmp/rwlock"
    lock.write_text(content)
    assert heal() == [".dvc/tmp/rwlock was cut short by a kill: removed"]
    assert not lock.exists() and heal() == []


@pytest.mark.parametrize("content", ["", "schema: '2.0'\nstages:\n  prepare:\n    cmd: [", "stages: 5\n"])
def test_a_damaged_dvc_lock_is_kept_aside_and_gits_restored(repository: Path, content: str) -> None:
    (repository / "dvc.lock").write_text(content)
    assert heal() == ["dvc.lock was damaged: kept as dvc.lock.corrupt, restored from git"]
    assert (repository / "dvc.lock").read_text() == GOOD and (repository / "dvc.lock.corrupt").read_text() == content


def test_good_files_are_left_alone(repository: Path) -> None:
    (repository / ".dvc/tmp/rwlock").write_text("{}")
    before = (repository / "dvc.lock").stat().st_mtime_ns
    assert heal() == [] and (repository / "dvc.lock").stat().st_mtime_ns == before


def test_checkpoints_are_listed_verified_and_pruned(repository: Path, monkeypatch, capsys) -> None:
    with work.open_work("train", "abc") as found:
        keeper = Checkpointer(found.folder / "checkpoints", "abc", settings(), found.lock)
        for step in (5, 10):
            keeper.save(step, 1, state(step), [], wait=True)
        keeper.close()

    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["captioning", "checkpoints", *arguments])
        cli.main()
        return capsys.readouterr().out

    listed = command("list").splitlines()
    assert len(listed) == 2 and listed[0].startswith("train  step 10, 1 epochs done")
    assert [line.split()[0] for line in command("verify").splitlines()] == ["good", "good"]
    victim = found.folder / "checkpoints/step-00000010/state.json"
    victim.write_text(victim.read_text() + " ")
    with pytest.raises(SystemExit) as caught:
        command("verify")
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "damaged  train" in printed.out and "1 checkpoints are damaged" in printed.err
    os.symlink(Path(storage.__file__).parents[1] / "params.yaml", repository / "params.yaml")
    assert command("prune") == "none\n" and found.folder.exists()  # nothing is old
    assert command("prune", "--force").startswith("removed ") and not found.folder.exists()

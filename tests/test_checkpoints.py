from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captioning import checkpoint_writer, storage
from captioning.checkpoints import Checkpointer, read_checkpoint
from captioning.errors import DamagedError
from captioning.params import RecoveryParams
from captioning.tensor_files import SharedBuffer, copy_tensors, join_tree, parse_tensors, split_tree

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def tensors() -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 4), max_size=3)

    def make(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 3).to(dtype)

    return st.builds(make, st.sampled_from(DTYPES), shapes, st.integers(0, 99))


LEAVES = st.one_of(tensors(), st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.", max_size=3), inner, max_size=3),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@given(TREES)
def test_a_tree_comes_back_exactly(tree: Any) -> None:
    import json

    plain, found = split_tree(tree)
    buffer = SharedBuffer()
    num_bytes = copy_tensors(found, buffer)
    content = buffer.bytes[:num_bytes].numpy().tobytes()
    buffer.close()
    assert same(join_tree(json.loads(json.dumps(plain)), parse_tensors(content)), tree)


def settings(**changes: Any) -> RecoveryParams:
    intervals = {"checkpoint_steps": 5, "checkpoint_minutes": 1e6}
    others = {"keep_checkpoints": 2, "max_restarts": 1, "keep_work_days": 1, "min_free_gb": 0}
    return RecoveryParams(**(intervals | others | changes))


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((1000,), float(step)), "step": step}


@pytest.fixture
def keeper(tmp_path: Path):
    made: list[Checkpointer] = []

    def make(**changes: Any) -> Checkpointer:
        lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
        made.append(Checkpointer(tmp_path / "checkpoints", "print", settings(**changes), lock))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_save_and_load_with_the_journal_and_the_last_two_kept(keeper, tmp_path, capsys) -> None:
    one = keeper()
    for step in (5, 10, 15):
        assert one.save(step, step // 10, state(step), [f'{{"step": {step}}}'], wait=True)
    assert [path.name for path in checkpoint_writer.checkpoint_folders(one.folder)] == [
        "step-00000015",
        "step-00000010",
    ]
    found = keeper().load()
    assert (found.step, found.epoch, found.journal) == (15, 1, [{"step": 15}])
    assert same(found.state, state(15))
    assert "resumed from step 15 (epoch 2, verified 0 MB in" in capsys.readouterr().out
    assert not list(one.folder.glob("*.tmp"))


def test_nothing_is_resumed_from_nothing(keeper, capsys) -> None:
    assert keeper().load() is None and capsys.readouterr().out == ""


def test_the_copy_is_taken_before_training_goes_on(keeper) -> None:
    """The tensors may change as soon as `save` returns, though the writer has not even started."""
    one, tree = keeper(), state(1)
    one.save(1, 0, tree, [])
    tree["weights"].fill_(-1)
    one.close()
    assert same(read_checkpoint(one.folder / "step-00000001", "print").state, state(1))


def test_due_after_steps_or_minutes_or_when_asked(keeper) -> None:
    one = keeper()
    assert not one.is_due(4) and one.is_due(5)
    assert one.save(5, 0, state(5), [], wait=True)
    assert not one.is_due(9) and one.is_due(10)
    one.ask()
    assert one.is_due(6) and one.save(6, 0, state(6), [], wait=True) and not one.is_due(7)
    two = keeper(checkpoint_minutes=1e-5)
    time.sleep(0.01)
    assert two.is_due(1)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "swap", "manifest"])
def test_the_newest_good_one_wins(keeper, harm: str, capsys) -> None:
    one = keeper()
    for step in (5, 10):
        one.save(step, 0, state(step), [], wait=True)
    newest, older = checkpoint_writer.checkpoint_folders(one.folder)
    victim = newest / (storage.MANIFEST if harm == "manifest" else checkpoint_writer.TENSORS)
    content = bytearray(victim.read_bytes())
    if harm in ("flip", "manifest"):
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif harm == "truncate":
        victim.write_bytes(content[:-1])
    elif harm == "delete":
        victim.unlink()
    else:
        shutil.copy(older / checkpoint_writer.TENSORS, victim)
    found = keeper().load()
    assert found.step == 5 and same(found.state, state(5))
    assert capsys.readouterr().out.rstrip().endswith("; step 10 was damaged, set aside")
    assert (one.folder / "step-00000010.corrupt").is_dir() and not newest.exists()


def test_without_a_good_one_it_starts_over_loudly(keeper, capsys) -> None:
    one = keeper()
    for step in (5, 10):
        one.save(step, 0, state(step), [], wait=True)
    for folder in checkpoint_writer.checkpoint_folders(one.folder):
        (folder / checkpoint_writer.PLAIN).write_text("{}")
    assert keeper().load() is None
    assert "no checkpoint is whole, so it starts over from step 0; steps 10, 5 were damaged" in capsys.readouterr().out


def test_another_runs_or_steps_checkpoint_is_refused(keeper) -> None:
    one = keeper()
    one.save(5, 0, state(5), [], wait=True)
    with pytest.raises(DamagedError, match="another run's"):
        read_checkpoint(one.folder / "step-00000005", "other")
    os.rename(one.folder / "step-00000005", one.folder / "step-00000006")
    with pytest.raises(DamagedError, match="another run's"):
        read_checkpoint(one.folder / "step-00000006", "print")


def test_a_writer_that_dies_is_replaced_and_said(keeper, capsys) -> None:
    one = keeper()
    one.save(5, 0, state(5), [], wait=True)
    os.kill(one.writer.pid, signal.SIGSTOP)
    one.save(10, 0, state(10), [])
    assert not one.is_due(99)  # one in flight
    os.kill(one.writer.pid, signal.SIGKILL)
    assert not one._take_answer()
    assert "step 10 was not saved: its writer process died" in capsys.readouterr().err
    assert one.save(15, 0, state(15), [], wait=True)
    assert keeper().load().step == 15


@pytest.mark.parametrize(("limit", "said"), [(4096, "File too large"), (0, "saving is paused")])
def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(keeper, monkeypatch, capsys, limit, said) -> None:
    import resource

    one = keeper()
    assert one.save(5, 0, state(5), [], wait=True)
    if limit:  # the writer runs into an error in the middle of a file
        resource.prlimit(one.writer.pid, resource.RLIMIT_FSIZE, (limit, limit))
        big = {"weights": torch.zeros(10_000)}
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
        big = state(10)
    assert not one.save(10, 0, big, [], wait=True)
    found = capsys.readouterr().err
    assert said in found and "the earlier checkpoints are kept" in found
    assert [path.name for path in one.folder.iterdir()] == ["step-00000005"]
    assert keeper().load().step == 5
    one.close()
    assert "WARNING: the last save failed" in capsys.readouterr().err
    one.last_error = None


def test_a_killed_trainer_leaves_a_whole_checkpoint_or_none(tmp_path) -> None:
    """The writer completes the save under way and ends by itself."""
    import subprocess
    import sys

    script = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(Path(storage.__file__).parents[1])!r})
from test_checkpoints import Checkpointer, settings, state
from pathlib import Path
one = Checkpointer(Path({str(tmp_path)!r}) / "c", "print", settings(), os.open(os.devnull, os.O_RDWR))
one.save(5, 0, state(5), [], wait=True)
one.save(10, 0, state(10), [])
print(one.writer.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    writer = int(done.stdout)
    while os.path.exists(f"/proc/{writer}"):
        time.sleep(0.05)
    assert storage.verify(tmp_path / "c" / "step-00000010") > 4000
    assert not list((tmp_path / "c").glob(".*"))


@pytest.mark.parametrize("num_bytes", [1, 4096, 4097, (1 << 22) + 4096, (1 << 23) + 17])
@pytest.mark.parametrize("refused", [False, True])
def test_writing_past_the_page_cache_writes_the_same_bytes(num_bytes, refused, tmp_path, monkeypatch) -> None:
    content = random.Random(num_bytes).randbytes(num_bytes)
    original = os.open
    flags = []

    def refuse_direct(path, flag, *args, **options) -> int:
        flags.append(flag)
        if refused and flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "this filesystem has no direct writes")
        return original(path, flag, *args, **options)

    monkeypatch.setattr(os, "open", refuse_direct)
    with mmap.mmap(-1, num_bytes) as memory:
        memory[:] = content
        with storage.commit(tmp_path / "folder", {}) as files:
            checkpoint_writer.write_past_cache(files, "tensors", memory)
    assert flags and flags[0] & os.O_DIRECT
    manifest = storage.read_manifest(tmp_path / "folder")
    assert storage.read_committed(tmp_path / "folder", "tensors", manifest) == content


def test_writing_past_the_page_cache_reports_a_full_disk(tmp_path, monkeypatch) -> None:
    def full(*_) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)
    with mmap.mmap(-1, 4096) as memory, pytest.raises(OSError, match="no space"):
        with storage.commit(tmp_path / "folder", {}) as files:
            checkpoint_writer.write_past_cache(files, "tensors", memory)
    assert not list(tmp_path.iterdir())

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captioning import work
from captioning.orphans import Holder, describe_self

HOLD = """
import sys, time
from captioning import work
with work.open_work("train", "abc"):
    print("held", flush=True)
    time.sleep(60)
"""
# A parent that starts the holder and dies at once, as dvc does under SIGKILL. Without DVC_STAGE nothing else ends it.
ABANDON = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    root = str(Path(work.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)
    return tmp_path


def start(script: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_fingerprints_follow_params_inputs_code_and_versions(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a"
    file.write_text("1")
    names = {
        work.fingerprint("s", {"a": 1}, [file]),
        work.fingerprint("t", {"a": 1}, [file]),
        work.fingerprint("s", {"a": 2}, [file]),
        work.fingerprint("s", {"a": 1}, [file], ["numpy"]),
    }
    assert work.fingerprint("s", {"a": 1}, [file]) in names
    file.write_text("2")
    assert len(names | {work.fingerprint("s", {"a": 1}, [file])}) == 5


def test_changed_code_never_resumes_stale_work(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("a = 1")
    (tmp_path / "dvc.yaml").write_text("stages:\n  x:\n    cmd: python -m stages.x\n    deps: [code.py, data]\n")
    work.code_files.cache_clear()
    before = work.fingerprint("x", {})
    assert work.code_files("x") == (Path("code.py"),) and work.code_files("y") == ()
    (tmp_path / "code.py").write_text("a = 2")
    assert work.fingerprint("x", {}) != before
    work.code_files.cache_clear()


def test_work_lies_under_the_main_repository_and_is_locked(root: Path, capfd) -> None:
    child = start(HOLD)
    assert first_line(child) == "held"
    waiting = start("from captioning import work\nwith work.open_work('train', 'abc') as w: print(w.folder)")
    assert first_line(waiting) == f"waiting for process {child.pid}, which does the same work"
    assert waiting.poll() is None
    child.kill()
    child.wait()
    assert first_line(waiting) == str(root / ".work/train/abc")
    assert waiting.wait() == 0


def test_an_orphan_is_told_to_stop_and_waited_for(root: Path, capsys) -> None:
    parent = start(ABANDON)
    orphan = int(first_line(parent))
    parent.wait()
    with work.open_work("train", "abc") as found:
        assert f"process {orphan} of an earlier run outlived it: told to stop" in capsys.readouterr().out
        assert not _is_running(orphan)
        holder = Holder.read(found.folder.with_name("abc.lock"))
        assert holder is not None and holder.pid == os.getpid() and holder.is_alive() and not holder.is_orphan()


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_lock_of_a_number_that_another_process_has_now_is_no_orphan() -> None:
    import json

    own = json.loads(describe_self())
    pid, started = own["ancestors"][0]
    assert not Holder(**own).is_orphan()
    assert not Holder(**{**own, "started": own["started"] - 1, "ancestors": []}).is_orphan()
    assert Holder(**{**own, "ancestors": [[pid, started - 1]]}).is_orphan()


def test_a_child_that_inherits_the_lock_keeps_others_out(root: Path) -> None:
    with work.open_work("train", "abc") as found:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[found.lock])
    waiting = start("from captioning import work\nwith work.open_work('train', 'abc'): print('in')")
    time.sleep(1)
    assert waiting.poll() is None
    child.communicate(b"\n")
    assert "in" in waiting.communicate()[0]


def test_leftovers_of_a_killed_write_are_removed(root: Path) -> None:
    with work.open_work("train", "abc") as found:
        (found.folder / "checkpoints/.step-00000005.tmp").mkdir(parents=True)
        (found.folder / "checkpoints/.step-00000005.tmp/a").touch()
        (found.folder / ".x.json.tmp").touch()
        (found.folder / "x.json").touch()
    with work.open_work("train", "abc") as found:
        assert sorted(p.name for p in found.folder.rglob("*")) == ["checkpoints", "work.json", "x.json"]


def make(name: str, published: bool, lock: Path) -> Path:
    os.environ["DVC_STAGE"] = "train@x"
    try:
        with work.open_work("train", name) as found:
            (found.folder / "data").write_text(name)
        if published:
            work.LOCK, before = str(lock), work.LOCK
            found.published()
            work.LOCK = before
    finally:
        del os.environ["DVC_STAGE"]
    return found.folder


def test_prune_waits_until_dvc_has_recorded_the_stage(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    lock = root / "dvc.lock"
    lock.write_text("schema: '2.0'\nstages:\n  train@x:\n    cmd: old\n  zzz:\n    cmd: x\n")
    done, begun = make("done", True, lock), make("begun", False, lock)
    assert work.prune(14, 0) == []  # the entry is still that of an earlier run
    os.utime(lock, ns=(time.time_ns() + 10**9,) * 2)  # git checkout, or another stage's record
    lock.write_text(lock.read_text().replace("cmd: x", "cmd: y"))
    assert work.prune(14, 0) == []
    lock.write_text(lock.read_text().replace("cmd: old", "cmd: new"))
    assert work.prune(14, 0) == [done] and not done.with_name("done.lock").exists()
    assert begun.exists()


def test_a_first_record_counts_too(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    done = make("done", True, root / "dvc.lock")
    assert work.prune(14, 0) == []
    (root / "dvc.lock").write_text("stages:\n  train@x:\n    cmd: x\n")
    assert work.prune(14, 0) == [done]


def test_prune_takes_old_work_and_the_oldest_where_the_disk_is_full(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    lock = root / "dvc.lock"
    lock.write_text("stages:\n  train@x:\n    cmd: x\n")
    old, new, used, last = (make(name, False, lock) for name in ("old", "new", "used", "last"))
    for folder, days in ((old, 20), (new, 2), (used, 30), (last, -1)):
        os.utime(folder / work.ABOUT, (time.time() - days * 86400,) * 2)
    child = start(HOLD.replace("abc", "used"))
    assert first_line(child) == "held"
    assert work.prune(14, 0) == [old]
    assert work.prune(14, 2**60) == [new] and last.exists()  # what the next run goes on with stays
    child.send_signal(signal.SIGKILL)
    child.wait()
    lock.write_text("stages:\n  prepare:\n    cmd: x\n")
    assert work.prune(1, 2**60) == []  # unfinished work of a stage that never finished is all there is of it

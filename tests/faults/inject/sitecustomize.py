"""Python imports this at start where the folder is on PYTHONPATH: it records file operations, and makes one go wrong.

`CAPSTAN_FAULTS` names a folder with `plan.json`: {"root": the clone, "faults": [{role, when, call, number, …}]}.
Every operation below the root is appended to `trace.jsonl`; the process that is first to reach a fault's operation
(`number` counts from 1, by call, within one process) makes the file `fired-<index>` and acts. No product code knows it.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import os
import resource
import signal
import sys
import threading
import time

FOLDER = os.environ.get("CAPSTAN_FAULTS")
HOLD_S = 5.0
"""How long a process stands still at its point while the harness kills another one."""

_open, _write, _close, _getsize = os.open, os.write, os.close, os.path.getsize
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
IGNORED = ("/.git/", "/__pycache__/", "/.dvc/tmp/btime", "/.dvc/site_cache/", "/.dvc/config")


class Injector:
    """This process's role, its counters, and what the plan holds for it."""

    def __init__(self, folder: str) -> None:
        with open(os.path.join(folder, "plan.json"), encoding="utf-8") as file:
            plan = json.load(file)
        self.folder, self.root = folder, plan["root"]
        self.planned = list(enumerate(plan["faults"]))
        self.counts: dict[str, int] = {}
        self.broken: dict | None = None
        self.thread = threading.local()
        self.stage = os.environ.get("DVC_STAGE", "")
        self.take_role(_role())
        os.register_at_fork(after_in_child=lambda: self.take_role("fork"))

    def take_role(self, role: str) -> None:
        self.role, self.counts = role, {}
        self.faults = [
            (index, fault)
            for index, fault in self.planned
            if fault["role"] == role and fault["stage"] in (self.stage, "")
        ]

    def inside(self, path: object, descriptor: int | None = None) -> str | None:
        """The path relative to the clone; None outside it and for what is no business of ours."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        name = os.fsdecode(path)  # type: ignore[arg-type]
        if descriptor is not None and not name.startswith("/"):
            name = f"{os.readlink(f'/proc/self/fd/{descriptor}')}/{name}"
        name = os.path.abspath(name)
        if not name.startswith(self.root + "/") or any(part in name for part in IGNORED):
            return None
        return name[len(self.root) + 1 :]

    def around(self, call: str, path: str, operation):
        """Runs an operation with its points before and after; points within points are not counted."""
        if getattr(self.thread, "busy", False):
            return operation()
        self.thread.busy = True
        try:
            number = self.counts[call] = self.counts.get(call, 0) + 1
            self.record(call, path, number)
            self.point("before", call, number)
            result = operation()
            self.point("after", call, number)
            return result
        finally:
            self.thread.busy = False

    def record(self, call: str, path: str, number: int) -> None:
        event = {"role": self.role, "stage": self.stage, "pid": os.getpid(), "call": call, "number": number}
        event["path"] = path
        if call in ("replace", "rename", "link") and os.path.isfile(source := os.path.join(self.root, path)):
            event["num_bytes"] = _getsize(source)
        event["time"] = round(time.monotonic(), 4)
        descriptor = _open(os.path.join(self.folder, "trace.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        _write(descriptor, (json.dumps(event) + "\n").encode())
        _close(descriptor)

    def point(self, when: str, call: str, number: int) -> None:
        if when == "before" and self.broken and call in self.broken["calls"]:
            self.act(self.broken, -1)
        for index, fault in self.faults:
            if (fault["when"], fault["call"], fault["number"]) == (when, call, number) and self.claim(index):
                self.act(fault, index)

    def claim(self, index: int) -> bool:
        """True for one process only, once."""
        try:
            _close(_open(os.path.join(self.folder, f"fired-{index}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        return True

    def act(self, fault: dict, index: int) -> None:
        action = fault["action"]
        if action == "kill":
            os.kill(os.getpid(), fault["signal"])
        elif action == "tell":
            self.wait_for_harness(f"done-{index}")
        elif action == "fail":
            self.broken = fault if fault["for_ever"] else None
            raise OSError(getattr(errno, fault["error"]), os.strerror(getattr(errno, fault["error"])))
        elif action == "sleep":
            self.broken = fault
            time.sleep(fault["seconds"])
        else:
            _limit_files(fault["num_bytes"], dies=action == "tear")

    def wait_for_harness(self, answer: str) -> None:
        """The harness sees the `fired` file and kills what it has to: at once, or, having answered, a moment later."""
        end = time.monotonic() + HOLD_S
        while time.monotonic() < end and not os.path.exists(os.path.join(self.folder, answer)):
            time.sleep(0.001)


def _limit_files(num_bytes: int, dies: bool) -> None:
    """The kernel lets no file grow beyond: a write in C, Rust or Java is cut there too. Death, or EFBIG as if full."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def _role() -> str:
    words = sys.orig_argv
    if "RANK" in os.environ and any(word.startswith("stages.") for word in words):
        return f"rank{os.environ['RANK']}"
    if "captioning.checkpoint_writer" in words:
        return "writer"
    if any(word.startswith("stages.") for word in words):
        return "stage"
    if "--multiprocessing-fork" in words:
        return "worker"
    return "dvc" if any(word.endswith("/dvc") for word in words) else "other"


def _replace(module: object, name: str, wrapped) -> None:
    original = getattr(module, name)
    for group in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if original in group:  # shutil asks there whether it may walk by descriptors
            group.add(wrapped)
    setattr(module, name, wrapped)


def _wrap_call(injector: Injector, name: str, dir_fd: str = "dir_fd") -> None:
    """Functions of `os` whose first argument is a path or a descriptor."""
    original = getattr(os, name)
    call = {"remove": "unlink"}.get(name, name)

    @functools.wraps(original)
    def wrapped(path, *args, **options):
        place = injector.inside(path, options.get(dir_fd))
        if place is None:
            return original(path, *args, **options)
        return injector.around(call, place, lambda: original(path, *args, **options))

    _replace(os, name, wrapped)


def _wrap_os_open(injector: Injector) -> None:
    original = os.open

    @functools.wraps(original)
    def wrapped(path, flags, *args, **options):
        place = injector.inside(path, options.get("dir_fd")) if flags & WRITES else None
        if place is None:
            return original(path, flags, *args, **options)
        return injector.around("open", place, lambda: original(path, flags, *args, **options))

    _replace(os, "open", wrapped)


def _wrap_open(injector: Injector) -> None:
    original = builtins.open

    @functools.wraps(original)
    def wrapped(file, mode="r", *args, **options):
        writes = not isinstance(file, int) and set(mode) & set("wax+")
        place = injector.inside(file) if writes else None
        if place is None:
            return original(file, mode, *args, **options)
        return injector.around("open", place, lambda: original(file, mode, *args, **options))

    builtins.open = io.open = wrapped  # type: ignore[assignment]


def _wrap_print(injector: Injector) -> None:
    """The checkpoint writer's answer, as `print`, and when the trainer can have it, as `answered`."""
    original = builtins.print

    def wrapped(*args, **options) -> None:
        injector.around("print", "", lambda: original(*args, **options))
        injector.record("answered", "", injector.counts["print"])

    builtins.print = wrapped


class OptimizerHook:
    """Counts optimizer steps, as operation `step`: waits for torch's optimizer module and hooks into it."""

    NAME = "torch.optim.optimizer"

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    def find_spec(self, name: str, path=None, target=None):
        if name != self.NAME:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            module.register_optimizer_step_post_hook(self.after_step)

        spec.loader.exec_module = exec_module
        return spec

    def after_step(self, *_: object) -> None:
        self.injector.around("step", "", lambda: None)


def install(folder: str) -> None:
    injector = Injector(folder)
    if injector.role == "other":
        return
    for name in ("fsync", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate"):
        _wrap_call(injector, name)
    for name in ("replace", "rename", "link"):
        _wrap_call(injector, name, "src_dir_fd")
    _wrap_os_open(injector)
    _wrap_open(injector)
    if injector.role == "writer":
        _wrap_print(injector)
    sys.meta_path.insert(0, OptimizerHook(injector))


if FOLDER:
    install(FOLDER)

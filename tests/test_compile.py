"""torch.compile: the same losses to rounding, exact resumption, and training without it where it fails.

Most run the backend that computes as plain torch does, after all of tracing; one compiles to machine code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_captions
from test_live import live_task, shards  # noqa: F401
from test_training import Stop, build, run, stop_at
from test_training_options import assert_same, keeper_in

from captioning import compiling
from captioning.compiling import describe_compiler
from captioning.decoders import DecoderConfig, build_decoder
from captioning.decoders.recurrent import RecurrentDecoder
from captioning.encoders import build_encoder
from captioning.errors import CapstanError
from captioning.interruption import Interrupted

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of what it traces


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def transformer(task: Any, dropout: float = 0.2) -> Any:
    """A Transformer in place of the task's decoder."""
    sizes: dict[str, Any] = {"hidden_dim": 16, "num_heads": 2, "num_layers": 1, "feedforward_dim": 24}
    torch.manual_seed(1)
    vocabulary_size = task.decoder.config.vocabulary_size
    return build_decoder(
        DecoderConfig(type="transformer", vocabulary_size=vocabulary_size, encoder_dim=6, dropout=dropout, **sizes)
    )


def start(folder: Any, kind: str = "transformer", **changes: Any) -> Any:
    """A task with its journal; the captions' lengths differ from batch to batch."""
    from captioning import training

    task, journal = build(folder, **({"num_epochs": 3, "log_every_steps": 1} | changes))
    if kind == "transformer":
        old = task
        task = training.DecoderTask(
            transformer(old), old.train, old.val, old.val_cider, old.settings, 0.02, journal
        )  # fmt: skip
    task.train.captions[:] = random_captions(11, task.decoder.config.vocabulary_size, longest=4)
    return task, journal


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_a_compiled_run_is_the_plain_one_to_rounding(tmp_path, kind: str, checkpointed: bool) -> None:
    """Dropout included. Every batch has other sizes, and no code is made after the first step."""
    plain, journal = start(tmp_path, kind)
    run(plain, journal)
    task, journal = start(tmp_path, kind, compile=True, gradient_checkpointing=checkpointed)
    from torch._dynamo.utils import counters

    made, real = [], task.train_step

    def train_step(*arguments: Any) -> Any:
        outcome = real(*arguments)
        made.append(counters["stats"]["unique_graphs"])
        return outcome

    task.train_step = train_step
    run(task, journal)
    assert task.compilation.used and not task.compilation.failed
    assert len(made) == 9 and made[0] > 0 and set(made) == {made[0]}
    for first, second in zip(task.history, plain.history, strict=True):
        assert first == pytest.approx(second, rel=1e-3)


def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch) -> None:
    wanted, journal = start(tmp_path, "lstm", compile=True)
    run(wanted, journal)
    for stop in (2, 5, None):
        task, journal = start(tmp_path, "lstm", compile=True)
        stop_at(task, stop, True, monkeypatch)
        if stop is None:
            run(task, journal, keeper_in(tmp_path))
        else:
            with pytest.raises(Stop):
                run(task, journal, keeper_in(tmp_path))
    assert task.compilation.used
    assert_same(task.state_dict(), wanted.state_dict())


def broken(graph: Any, example: Any) -> Any:
    raise RuntimeError("no compiler here")


def test_where_it_fails_the_run_is_the_plain_one(tmp_path, monkeypatch, capsys) -> None:
    """Bit for bit, from the first step on; and so it stays when it is resumed where compiling would work."""
    plain, journal = start(tmp_path)
    run(plain, journal)
    monkeypatch.setattr(compiling, "BACKEND", broken)
    task, journal = start(tmp_path, compile=True)
    stop_at(task, 4, True, monkeypatch)
    with pytest.raises(Stop):
        run(task, journal, keeper_in(tmp_path))
    said = capsys.readouterr().out
    assert said.count("train.compile: training goes on without it:") == 1 and "no compiler here" in said
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    task, journal = start(tmp_path, compile=True)
    run(task, journal, keeper_in(tmp_path))
    assert "goes on without" in capsys.readouterr().out
    assert task.compilation.failed and not task.compilation.used
    assert_same(task.decoder.state_dict(), plain.decoder.state_dict())
    assert task.history == plain.history


def test_what_fails_only_after_a_resume_ends_the_run(tmp_path, monkeypatch) -> None:
    """It would go on with other bits than a run that was not stopped. Later, where it can be compiled, it goes on."""
    wanted, journal = start(tmp_path, compile=True)
    run(wanted, journal)
    task, journal = start(tmp_path, compile=True)
    stop_at(task, 4, True, monkeypatch)
    with pytest.raises(Stop):
        run(task, journal, keeper_in(tmp_path))
    monkeypatch.setattr(compiling, "BACKEND", broken)
    task, journal = start(tmp_path, compile=True)
    with pytest.raises(CapstanError, match="was compiled when it began, and now that fails.*no compiler here"):
        run(task, journal, keeper_in(tmp_path))
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    task, journal = start(tmp_path, compile=True)
    run(task, journal, keeper_in(tmp_path))
    assert_same(task.decoder.state_dict(), wanted.decoder.state_dict())


@pytest.mark.parametrize("stop", [9, None])
def test_the_record_says_that_it_was_compiled_also_where_no_step_was_left(tmp_path, monkeypatch, stop) -> None:
    task, journal = start(tmp_path, compile=True)
    stop_at(task, stop, False, monkeypatch)
    if stop is not None:
        with pytest.raises(Interrupted):  # saved in the last epoch's validation
            run(task, journal, keeper_in(tmp_path))
        task, journal = start(tmp_path, compile=True)
    made: list[object] = []
    monkeypatch.setattr(task.compilation, "_try", lambda: made.append(1))
    run(task, journal, keeper_in(tmp_path))
    assert task.compilation.used and bool(made) == (stop is None)


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_self_critical_epochs_are_compiled_and_resumed(tmp_path, monkeypatch, kind: str) -> None:
    critical = {"start_epoch": 2, "num_samples": 2, "rate_factor": 0.5, "cross_entropy_weight": 0.5}
    changes: dict[str, Any] = {"compile": True, "self_critical": critical}
    wanted, journal = start(tmp_path, kind, **changes)
    run(wanted, journal)
    task, journal = start(tmp_path, kind, **changes)
    stop_at(task, 6, True, monkeypatch)
    with pytest.raises(Stop):
        run(task, journal, keeper_in(tmp_path))
    task, journal = start(tmp_path, kind, **changes)
    run(task, journal, keeper_in(tmp_path))
    assert task.compilation.used
    assert_same(task.decoder.state_dict(), wanted.decoder.state_dict())


def test_a_backward_pass_that_cannot_be_compiled_is_found_before_the_first_step(tmp_path, monkeypatch, capsys) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda graph, example: make_boxed_func(graph.forward), bw_compiler=broken)
    monkeypatch.setattr(compiling, "BACKEND", backend)
    plain, journal = start(tmp_path, num_epochs=1)
    run(plain, journal)
    task, journal = start(tmp_path, num_epochs=1, compile=True)
    run(task, journal)
    assert "no compiler here" in capsys.readouterr().out and task.compilation.failed
    assert_same(task.decoder.state_dict(), plain.decoder.state_dict())


def test_one_process_that_fails_takes_all_with_it(tmp_path, capsys) -> None:
    task, _ = start(tmp_path, compile=True)

    class Two:
        rank, is_main = 0, True

        def sum_numbers(self, numbers: list[float]) -> list[float]:
            return [numbers[0] + 1.0]

    task.compilation.world = Two()
    task.compilation.prepare()
    assert task.compilation.failed and not task.compilation.used and "read" not in vars(task.decoder)
    assert "it failed in another process" in capsys.readouterr().out


def test_in_live_mode_code_is_made_again_when_stages_thaw(shards, monkeypatch) -> None:  # noqa: F811
    """Also where a run is resumed in between: encoder and decoder end as in a run that was never stopped."""
    made: list[tuple[bool, ...]] = []
    real = compiling.Compilation._try
    monkeypatch.setattr(compiling.Compilation, "_try", lambda self: made.append(self._learning) or real(self))

    def task_of() -> Any:
        torch.manual_seed(1)
        encoder = build_encoder("squeezenet1_1", "random")
        task, journal = live_task(shards, encoder, 1, every=1, num_epochs=2)
        task.compilation.wanted = True
        return task, journal

    wanted, journal = task_of()
    run(wanted, journal)
    assert len(made) == 2 and sum(made[1]) > sum(made[0]) and wanted.compilation.used
    assert {name for owner, name in wanted.compilation._parts} == {"forward", "remember", "combine"}
    folder = shards.parent
    task, journal = task_of()
    stop_at(task, 3, True, monkeypatch)
    with pytest.raises(Stop):
        run(task, journal, keeper_in(folder))
    task, journal = task_of()
    run(task, journal, keeper_in(folder))
    assert_same(dict(task.decoder.state_dict()), dict(wanted.decoder.state_dict()))


def test_without_it_nothing_is_traced(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    task, journal = start(tmp_path, num_epochs=1)
    run(task, journal)
    assert not task.compilation.used and not task.compilation.failed


def test_a_run_is_named_by_its_compiler(monkeypatch, tmp_path) -> None:
    assert describe_compiler(False) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert describe_compiler(True) == ["compiled", None]
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\necho 'compiler 1.2'\n")
    program.chmod(0o755)
    assert describe_compiler(True) == ["compiled", "compiler 1.2"]


def test_machine_code_computes_the_same(tmp_path, monkeypatch) -> None:
    """A GPU's compiler is another matter; here it is the C++ one, where there is one."""
    if describe_compiler(True)[-1] is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(RecurrentDecoder, "compiled", ("combine",))
    plain, journal = start(tmp_path, "lstm", num_epochs=1)
    run(plain, journal)
    task, journal = start(tmp_path, "lstm", num_epochs=1, compile=True)
    run(task, journal)
    assert task.compilation.used
    assert task.history[0] == pytest.approx(plain.history[0], rel=1e-3)

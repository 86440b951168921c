"""torch.compile for training, and without it where that fails (`train.compile`).

What is compiled decides the last digits of a result, so it must not depend on where a run was stopped. Code is made for
one example, the run's first batch, before the first step, and again whenever other parameters begin to learn; sizes
that differ from batch to batch are symbols in it. Nothing is compiled in between: what the code does not fit (a last,
smaller batch in live mode) runs as it would without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captioning.decoders import Decoder
from captioning.distributed import World
from captioning.errors import CapstanError, brief

BACKEND = "inductor"


def describe_compiler(wanted: bool) -> list[object]:
    """What compiled code depends on besides torch: nothing where none is wanted; else the C++ compiler, if any."""
    if not wanted:
        return []
    names = (os.environ.get("CXX"), "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        return ["compiled", None]
    lines = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return ["compiled", *lines[:1]]


class Compilation:
    """The compiled parts of a model, in training alone: validation and search run as without."""

    def __init__(
        self, model: Decoder, example: Callable[[], Tensor | None], world: World, wanted: bool, deterministic: bool
    ) -> None:
        """`example`: this rank's loss of a batch that is always the same, or None where it has no part in it."""
        self.model, self.example, self.world, self.deterministic = model, example, world, deterministic
        self.wanted = wanted
        self.failed = False
        self._learning: tuple[bool, ...] = ()
        self._goes_on = False
        self._warming = False
        self._parts: list[tuple[nn.Module, str]] = []

    @property
    def used(self) -> bool:
        """Whether the run's steps are made by compiled code, those before a resume counted."""
        return self.wanted and not self.failed

    def prepare(self) -> None:
        """Compiles where that is to be done: before the first step, and where other parameters learn than before.

        No random number is drawn and no gradient left. What fails is said, and all ranks go on without.

        Raises:
            CapstanError: the run's beginning was compiled, and here that fails: it would end with other bits.
        """
        if not self.wanted or self.failed:
            return
        learning = tuple(parameter.requires_grad for parameter in self.model.parameters())
        if learning == self._learning:
            return
        self._learning = learning
        self._remove()
        error = self._try()
        self.model.zero_grad(set_to_none=True)
        (num_failed,) = self.world.sum_numbers([float(error is not None)])
        goes_on, self._goes_on = self._goes_on, False
        if num_failed:
            self._remove()
            self.failed = True
            error = error or "it failed in another process"
            if goes_on:
                raise CapstanError(
                    f"train.compile: this run was compiled when it began, and now that fails: {error}. Run it again "
                    "where it can be compiled, with as much free memory; or set train.compile to false."
                )
            if self.world.is_main:
                print(f"train.compile: training goes on without it: {error}", flush=True)

    def resume(self, failed: bool) -> None:
        """Takes up a run that went on without: so does this one, for the same bits."""
        self.failed, self._goes_on = failed, not failed
        if self.wanted and failed and self.world.is_main:
            print("train.compile: this run could not be compiled when it began, and goes on without", flush=True)

    def _try(self) -> str | None:
        """Compiles and runs the example; what went wrong, in a line."""
        import torch._dynamo
        import torch._inductor.config as inductor
        import torch.fx.experimental._config as shapes

        inductor.compile_threads = 1  # no processes that would outlive this one
        torch._dynamo.reset()  # as in a fresh process, whatever was compiled before
        self._warming = True
        try:
            # Two sizes that happen to be equal in the example need not be in another batch.
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                for owner, name, varies in self.model.parts_to_compile():
                    owner.__dict__[name] = self._compiled(getattr(owner, name), varies)
                    self._parts.append((owner, name))
                self.model.train()
                loss = self.example()
                if loss is None:
                    return "a process has no part of the first batch"
                loss.backward()
        except Exception as error:  # whatever a compiler can raise: it is not needed
            return brief(error)
        finally:
            self._warming = False
        return None

    def _compiled(self, plain: Callable[..., Any], varies: bool) -> Callable[..., Any]:
        options: dict[str, Any] = {
            "fallback_random": True,
            "deterministic": self.deterministic,
        }  # dropout as without compiling
        compiled = torch.compile(plain, backend=BACKEND, options=options if BACKEND == "inductor" else None)

        def call(*inputs: Any) -> Any:
            if not self.model.training:
                return plain(*inputs)
            if self._warming:
                _mark(inputs, varies)
                return compiled(*inputs)
            with torch.compiler.set_stance("eager_on_recompile"):
                return compiled(*inputs)

        return call

    def _remove(self) -> None:
        while self._parts:
            owner, name = self._parts.pop()
            del owner.__dict__[name]


def _mark(inputs: Any, varies: bool) -> None:
    """Tells of which sizes code is to be independent: all but a vector's own."""
    for value in inputs:
        if is_dataclass(value):
            _mark([getattr(value, field.name) for field in fields(value)], varies)
        elif isinstance(value, Tensor) and varies:
            for place in range(value.dim() - value.is_floating_point()):
                torch._dynamo.maybe_mark_dynamic(value, place)

"""What stands for `auto` and `range_test`: by formula, by trial, the same in each run and in one that goes on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from test_checkpoints import settings as recovery
from test_datasets import annotation
from test_distributed import torchrun
from test_memory import gpu_error
from test_training import WORDS, Stop, build, settings
from test_training_options import assert_same

from captioning import heuristics, resolving, tensor_files, training, trials
from captioning.annotations import dump_annotations
from captioning.distributed import ALONE, World
from captioning.encoders import build_encoder
from captioning.errors import CapstanError
from captioning.feature_files import write_features
from captioning.params import parse_params
from captioning.train_params import PlainTrainParams
from captioning.vocabulary import Vocabulary
from stages import train as stage

ROOT = Path(__file__).parents[1]
WORDY = {"batch_size": "auto", "num_epochs": "auto"}


def parse(learning_rate: Any = 0.001, frequency: Any = 2, **train: Any):
    tree = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    tree["decoder_settings"]["lstm"]["learning_rate"] = learning_rate
    tree["prepare"]["tokenizer"]["min_frequency"] = frequency
    tree["train"] |= train
    return parse_params(tree)


# Words in params.yaml


def test_words_may_stand_for_numbers() -> None:
    params = parse("range_test", "auto", **WORDY)
    assert params.train.batch_size == params.train.num_epochs == params.prepare.tokenizer.min_frequency == "auto"
    assert params.decoder_settings["lstm"].learning_rate == "range_test"
    assert parse("5e-4", "3", batch_size="64").train.batch_size == 64  # as `dvc exp run -S` may write them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": "atuo"}, "train.batch_size: Input should be a valid integer or 'auto' (got 'atuo')"),
        ({"batch_size": 0}, "train.batch_size: Input should be greater than 0 (got 0)"),
        ({"num_epochs": "many"}, "train.num_epochs: Input should be a valid integer or 'auto' (got 'many')"),
        ({"num_epochs": "range_test"}, "train.num_epochs: Input should be a valid integer or 'auto'"),
        (
            {"frequency": "often"},
            "prepare.tokenizer.min_frequency: Input should be a valid integer or 'auto' (got 'often')",
        ),
        (
            {"learning_rate": "find"},
            "decoder_settings.lstm.learning_rate: Input should be a valid number, 'auto' or 'range_test' (got 'find')",
        ),
        ({"learning_rate": -1.0}, "decoder_settings.lstm.learning_rate: Input should be greater than 0 (got -1.0)"),
        (
            {"learning_rate": "auto", "optimizer": {"name": "adadelta", "rho": 0.9, "weight_decay": 0.0}},
            "decoder_settings.lstm: learning_rate auto knows no rate for adadelta with a lstm, only for adam, adamw,",
        ),
    ],
)
def test_other_words_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CapstanError) as caught:
        parse(**changes)
    assert message in str(caught.value) and "1 error(s)" in str(caught.value)


# Formulas


@pytest.mark.parametrize(
    ("num_captions", "frequency"), [(0, 1), (170, 1), (6000, 1), (7000, 2), (29985, 5), (30000, 5), (566747, 5)]
)
def test_rare_words_are_those_seen_once_in_6000_captions(num_captions: int, frequency: int) -> None:
    assert heuristics.resolve_min_frequency("auto", num_captions) == frequency
    assert heuristics.resolve_min_frequency(7, num_captions) == 7


@pytest.mark.parametrize(
    ("num_images", "fits", "size"),
    [(1400, 719, 32), (5997, 999, 64), (113287, 9999, 256), (113287, 100, 64), (30, 99, 4), (1, 9, 1), (1400, 1, 1)],
)
def test_a_batch_is_a_power_of_two_below_the_root_of_the_images_and_fits(num_images, fits, size) -> None:
    assert heuristics.choose_batch_size(num_images, fits) == size


@pytest.mark.parametrize(("steps", "epochs"), [(44, 23), (94, 11), (188, 10), (443, 10), (1, 30), (40, 25)])
def test_epochs_come_to_1000_steps_within_bounds(steps: int, epochs: int) -> None:
    assert heuristics.choose_num_epochs(steps) == epochs


def test_rates_are_scaled_with_batch_and_width_by_the_optimizers_rule() -> None:
    choose = heuristics.choose_rate
    assert choose("lstm", 384, "adamw", 32) == 1e-3 and choose("transformer", 256, "adam", 32) == 1e-3
    assert choose("lstm", 384, "adamw", 128) == 2e-3  # four times the batch: twice the rate
    assert choose("gru", 768, "nadam", 32) == 5e-4  # twice the width: half the rate
    assert choose("lstm", 512, "adamw", 64) == 0.0011
    assert choose("lstm", 384, "sgd", 32) == 1.0 and choose("lstm", 768, "sgd", 128) == 4.0
    assert choose("gru", 384, "sgd", 32, momentum=0.9) == pytest.approx(0.1)
    for optimizer in ("adagrad", "asgd", "adafactor"):
        with pytest.raises(ValueError, match=f"knows no rate for {optimizer}"):
            choose("lstm", 384, optimizer, 32)
    with pytest.raises(ValueError, match="sgd with a transformer"):
        choose("transformer", 256, "sgd", 32)


def test_the_rate_of_a_range_test_is_where_the_curve_falls_steepest() -> None:
    rates = np.geomspace(1e-5, 10, 121)
    # A fall of a logistic curve around 1e-2, long before a rise at 1.
    losses = 3 - 2 / (1 + np.exp(-8 * np.log10(rates / 1e-2))) + np.maximum(0, np.log10(rates)) ** 2 * 20
    found = heuristics.choose_rate_by_test(rates.tolist(), losses.tolist())
    assert 1e-2 <= found <= 2.5e-2  # smoothing comes some steps late
    # Where the minimum comes at once behind the fall, a tenth of its rate.
    sharp = np.where(rates < 1e-2, 3 - 0.1 * np.arange(121), 99.0)
    lowest = rates[np.argmin(heuristics.smooth(sharp.tolist()))]
    assert heuristics.choose_rate_by_test(rates.tolist(), sharp.tolist()) == pytest.approx(lowest / 10, rel=0.05)
    for curve in (np.linspace(1, 9, 50), np.full(50, 2.0), []):
        with pytest.raises(ValueError, match="rose from the first rates on"):
            heuristics.choose_rate_by_test(rates[: len(curve)].tolist(), list(curve))


def test_smoothing_is_a_mean_of_what_came_before() -> None:
    assert heuristics.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert heuristics.smooth([1.0, 3.0]) == pytest.approx([1.0, (0.9 * 0.1 * 1 + 0.1 * 3) / 0.19])


# Trials


def data_of(task) -> Any:
    return task.train, task.val, task.val_cider


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_bytes_are_those_of_tensors_that_live_together() -> None:
    kept = torch.zeros(1000)
    with trials.watching(torch.device("cpu")) as peak:
        for _ in range(3):
            first = kept * 2  # 4000 bytes
            view = first.view(10, 100)
            second = view + 1  # 4000 more, and no more for the view
            del first, view, second
            kept.mul_(2)
        third = kept[:500] * 1.0
        assert third.sum() == 0
    assert peak == [8000]


def test_bytes_of_what_backward_keeps_and_makes() -> None:
    weight = torch.zeros(100, 100, requires_grad=True)
    with trials.watching(torch.device("cpu")) as peak:
        values = torch.zeros(50, 100)  # 20000
        for _ in range(4):
            values = (values @ weight).tanh()  # 20000 each, kept for backward, and its argument for a moment
        values.sum().backward()
    assert 100_000 + 40_000 <= peak[0] <= 100_000 + 40_000 + 5 * 40_000


def test_a_steps_memory_grows_with_its_images_and_is_the_same_each_time(tmp_path) -> None:
    task, _ = build(tmp_path)
    task.train.size = 16
    with trials.leaving_no_trace():
        found = [[trials.bytes_of_step(task, number) for number in (2, 4, 8, 16)] for _ in range(2)]
    assert found[0] == found[1]
    steps = np.diff(found[0])
    assert steps[0] > 0 and steps[2] == pytest.approx(2 * steps[1], rel=0.3)


def test_what_fits_leaves_the_budget_unbroken(tmp_path, monkeypatch) -> None:
    task, _ = build(tmp_path)
    plain = settings()
    for budget in (2e6, 4e6):
        monkeypatch.setattr(trials, "CPU_BUDGET", budget)
        most = trials.images_that_fit(task.decoder, data_of(task), plain)
        weights = sum(4 * p.numel() for p in task.decoder.parameters())
        task.train.size = 2 * most
        with trials.leaving_no_trace():
            taken = [trials.bytes_of_step(task, number) + 3 * weights for number in (most, most + most // 5 + 1)]
        assert 0.85 * budget < taken[0] < 1.15 * budget < 1.3 * taken[1]
    monkeypatch.setattr(trials, "CPU_BUDGET", 1.0)
    assert trials.images_that_fit(task.decoder, data_of(task), plain) == 1


def test_a_gpu_too_small_for_the_trials_takes_one_image(tmp_path, monkeypatch) -> None:
    task, _ = build(tmp_path)

    def measure(_, num_images: int) -> int:
        if num_images > limit:
            raise gpu_error()
        return 1000 * num_images + 500

    monkeypatch.setattr(trials, "bytes_of_step", measure)
    for limit, most in ((1, 1), (4, 1995000), (99, 1995000)):  # noqa: B007 - `measure` reads it
        found = trials.images_that_fit(task.decoder, data_of(task), settings())
        assert found == most if most == 1 else abs(found - most) < 6000
    monkeypatch.setattr(trials, "bytes_of_step", lambda *a: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trials.images_that_fit(task.decoder, data_of(task), settings())


def test_trials_leave_no_trace(tmp_path) -> None:
    task, _ = build(tmp_path, dropout=0.3)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    before = random_states(), {name: value.clone() for name, value in task.decoder.state_dict().items()}
    found = [
        (trials.images_that_fit(task.decoder, data_of(task), settings()),
         trials.range_test(task.decoder, data_of(task), settings()))
        for _ in range(2)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert random_states() == before[0]
    assert_same(dict(task.decoder.state_dict()), before[1])
    assert all(p.grad is None for p in task.decoder.parameters()) and task.journal.lines == []


def test_a_range_test_raises_the_rate_until_the_loss_diverges(tmp_path) -> None:
    task, _ = build(tmp_path, dropout=0.0)
    curve = trials.range_test(task.decoder, data_of(task), settings())
    rates, losses = zip(*curve, strict=True)
    assert rates[0] == 1e-5 and np.allclose(np.diff(np.log(rates)), math.log(1e6) / 119)
    assert 40 < len(curve) < 120  # it ended before the last rate
    found = heuristics.choose_rate_by_test(rates, losses)
    assert 1e-3 < found < 0.3
    # Pieces, as several processes would take them, are the same steps.
    pieces = trials.range_test(task.decoder, data_of(task), settings(), num_processes=2)
    assert [loss for _, loss in pieces[:30]] == pytest.approx(losses[:30], rel=1e-3)


# Resolution


class Asked:
    """Trials that only count how often they are asked for."""

    def __init__(self, fits: int = 1000) -> None:
        self.fits, self.sizes = fits, list[int]()

    def images_that_fit(self, plain: PlainTrainParams) -> int:
        self.sizes.append(-1)
        return self.fits

    def range_test(self, plain: PlainTrainParams) -> list[tuple[float, float]]:
        self.sizes.append(plain.batch_size)
        rates = np.geomspace(1e-5, 10, 120)
        return [(float(r), float(3 - 2 / (1 + np.exp(-8 * np.log10(r / 1e-2))))) for r in rates]


def resolve(folder: Path, asked: Asked, learning_rate: Any = "auto", world: World = ALONE, **train: Any):
    params = parse(learning_rate, **train)
    folder.mkdir(exist_ok=True)
    decoder = params.decoder_settings["lstm"]
    return resolving.resolve(
        params.train, decoder, 5997, asked.images_that_fit, asked.range_test, folder, world
    )  # fmt: skip


def test_numbers_stay_and_nothing_is_tried_or_kept(tmp_path, capsys) -> None:
    values = resolve(tmp_path, asked := Asked(), 0.004)
    assert (values.settings.batch_size, values.settings.num_epochs, values.learning_rate) == (32, 14, 0.004)
    assert values.found == {} and not asked.sizes and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_each_word_becomes_a_number_and_says_why(tmp_path, capsys) -> None:
    values = resolve(tmp_path, asked := Asked(), **WORDY)
    assert (values.settings.batch_size, values.settings.num_epochs, values.learning_rate) == (64, 11, 0.0014)
    assert asked.sizes == [-1]
    assert capsys.readouterr().out.splitlines() == [
        "batch_size 64 (auto: 5997 train images, 1000 at once fit into memory)",
        "num_epochs 11 (auto: 94 steps an epoch)",
        "learning_rate 0.0014 (auto: lstm of width 384, adamw, 64 images a step)",
    ]
    json.dumps(values.found)


def test_accumulated_batches_count_as_one(tmp_path) -> None:
    values = resolve(tmp_path, Asked(), batch_size=16, num_epochs="auto", accumulate_steps=8)
    assert values.settings.num_epochs == 21 and values.learning_rate == 0.002  # 47 steps of 128 images


def test_found_once_and_used_again(tmp_path, capsys) -> None:
    first = resolve(tmp_path / "one", Asked(), "range_test", **WORDY)
    capsys.readouterr()
    again = resolve(tmp_path / "one", asked := Asked(fits=2), "range_test", **WORDY)
    assert again == first and not asked.sizes
    assert "batch_size 64 (auto: 5997 train images, 1000 at once fit into memory; as found before)" in (
        capsys.readouterr().out
    )
    other = resolve(tmp_path / "two", asked, "range_test", **WORDY)  # another run's folder
    assert other.settings.batch_size == 2 and asked.sizes == [-1, 2]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_what_was_found_and_is_damaged_is_found_again(tmp_path, damage: str) -> None:
    first = resolve(tmp_path, Asked(), "range_test", **WORDY)
    path = tmp_path / resolving.FILE
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])
    assert resolve(tmp_path, asked := Asked(), "range_test", **WORDY) == first and asked.sizes == [-1, 64]


def test_a_range_test_without_a_fall_asks_for_a_number(tmp_path, monkeypatch) -> None:
    asked = Asked()
    monkeypatch.setattr(asked, "range_test", lambda plain: [(1e-5 * 2**i, 1.0 + i) for i in range(9)])
    with pytest.raises(CapstanError, match=r"learning_rate: range_test finds none: the loss rose .* Give a number"):
        resolve(tmp_path, asked, "range_test")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path) -> None:
    task, _ = build(tmp_path, num_epochs=2)
    other, _ = build(tmp_path, num_epochs=3)
    with pytest.raises(CapstanError, match=r"'num_epochs': 2.*'num_epochs': 3.*other hardware"):
        other.load_state_dict(task.state_dict())


RANKS = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from captioning.distributed import join_world
from test_resolving import WORDY, Asked, resolve
with join_world() as world:
    asked = Asked(fits=9) if world.is_main else None  # the other process has nothing to ask
    asked = asked or type("Nothing", (), dict(images_that_fit=None, range_test=None))()
    values = resolve(Path({folder!r}), asked, "range_test", world, **WORDY)
    sizes = values.settings.batch_size, values.settings.num_epochs, values.learning_rate
    (Path({folder!r}) / f"rank{{world.rank}}").write_text(json.dumps(sizes))
"""


def test_all_processes_get_what_the_main_one_found(tmp_path) -> None:
    """Two processes hold 18 images between them, if each one's memory holds 9."""
    here = Path(__file__).parent
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(here), root=str(here.parent), folder=str(tmp_path)))
    said = torchrun("--standalone", "--nproc-per-node=2", script)
    assert said.count("batch_size 16 (auto: 5997 train images, 18 at once fit") == 1
    found = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1] and found[0][:2] == [16, 10]


# The stage


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Prepared annotations and features of 20 images, as the stages before leave them."""
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder("efficientnet_lite0", "package")
    values = np.random.default_rng(1).random((20, *encoder.grid, 8))
    features = np.zeros((20, encoder.num_regions, encoder.encoder_dim), np.float16)
    features[..., :8] = values.reshape(20, encoder.num_regions, 8)
    write_features(
        tmp_path / "features" / "00000.h5", [f"{i:08d}" for i in range(20)], features, encoder.describe(), "digest"
    )
    vocabulary = Vocabulary.build([" ".join(WORDS)], 1, 4)
    vocabulary.save(tmp_path / "prepared" / "vocabulary.json")
    for split, part in (("train", range(16)), ("val", range(16, 20))):
        images = [
            annotation(i, "00000", split).model_copy(update={"captions": [f"{WORDS[i % 3]} {WORDS[3 + i % 2]}"]})
            for i in part
        ]
        (tmp_path / "prepared" / f"{split}.json").write_text(json.dumps(dump_annotations(images)))
    return {name: tmp_path / name for name in ("prepared", "features", "shards")}


def run_stage(folders: dict[str, Path], out: Path, learning_rate: Any, **train: Any) -> None:
    small = {"embedding_dim": 8, "hidden_dim": 16, "attention_dim": 8, "region_dim": 8}
    params = parse(learning_rate, precision="fp32", log_every_steps=1, **train)
    decoder = params.decoder_settings["lstm"].model_copy(update=small)
    stage.train(
        "efficientnet_lite0", "lstm", params.encoder_settings["efficientnet_lite0"], decoder, params.train,
        recovery(checkpoint_steps=3), params.logging, **folders, live_dir=out / "live", logs=out / "logs",
        out=out / "model",
    )  # fmt: skip


def test_the_stage_resolves_records_and_goes_on_with_it(folders, tmp_path, monkeypatch, capsys) -> None:
    """Killed in step 7, it goes on with what it had found; it ends with the bits of a run given the numbers."""
    real, made = training.DecoderTask.train_step, []

    def train_step(self, shares, step, stop):
        if made is not None and self.settings.log_every_steps == 1 and step == 7 and not made:
            made.append(step)
            raise Stop
        return real(self, shares, step, stop)

    monkeypatch.setattr(training.DecoderTask, "train_step", train_step)
    with pytest.raises(Stop):
        run_stage(folders, tmp_path / "auto", "range_test", **WORDY)
    assert "as found before" not in capsys.readouterr().out
    monkeypatch.setattr(trials, "range_test", lambda *a: pytest.fail("it was found before"))
    run_stage(folders, tmp_path / "auto", "range_test", **WORDY)
    said = capsys.readouterr().out
    assert "batch_size 4 (auto: 16 train images," in said and "num_epochs 30 (auto: 4 steps an epoch; as found" in said
    assert "resumed from step" in said
    record = json.loads((tmp_path / "auto" / "model" / "training.json").read_text())
    found = record["resolved"]
    assert record["params"]["train"]["batch_size"] == "auto"
    assert found["batch_size"] == found["images_at_once"] == 4 and found["num_epochs"] == len(record["history"]) == 30
    assert set(found["because"]) == {"batch_size", "num_epochs", "learning_rate"} and len(found["range_test"]) > 8
    run_stage(folders, tmp_path / "given", found["learning_rate"], batch_size=4, num_epochs=30)
    weights = [
        tensor_files.parse_tensors((tmp_path / name / "model" / "model.safetensors").read_bytes())
        for name in ("auto", "given")
    ]
    assert_same(*(dict(sorted(found.items())) for found in weights))

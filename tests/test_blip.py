"""BLIP: trained small here, loaded from a folder or a hub, and what happens where neither is to be had."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioning import blip as blip_module
from captioning import paths, storage
from captioning.annotations import Annotation, dump_annotations, load_annotations, load_images
from captioning.blip import caption_images, choose_precision, iterate_images, load_pretrained
from captioning.blip_training import (
    BlipTask,
    _draw_batches,
    _loss,
    as_captioner,
    build_small_blip,
    normalise,
    store_pixels,
)
from captioning.checkpoints import Checkpointer
from captioning.errors import CapstanError, DamagedError
from captioning.interruption import Interrupted
from captioning.loop import Journal, Loop, Outcome
from captioning.params import RecoveryParams, SmallBlip
from captioning.shards import TARS, ShardWriter, write_ledger
from captioning.vocabulary import Vocabulary
from stages.blip import blip

SMALL = SmallBlip(
    image_px=32,
    patch_px=16,
    hidden_dim=32,
    num_layers=1,
    num_heads=2,
    num_epochs=12,
    captions_per_step=2,
    learning_rate=0.01,
    warmup_steps=5,
    weight_decay=0.01,
)
SHORT = SMALL.model_copy(update={"num_epochs": 2})
RECOVERY = RecoveryParams(
    checkpoint_steps=3, checkpoint_minutes=10, keep_checkpoints=2, max_restarts=0, keep_work_days=1, min_free_gb=0
)
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
VOCABULARY = Vocabulary(["<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "blue", "square", "thing"], max_length=4)


@pytest.fixture(autouse=True)
def restore_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of one-coloured images with what `prepare` makes of them: 32 for training, 6 for the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    draw = np.random.default_rng(0)
    paths.SHARDS.mkdir(parents=True)
    images = []
    for shard in ("00000", "00001"):
        with ShardWriter(paths.SHARDS / f"{shard}.tar") as writer:
            for number in range(19):
                key = f"{shard}{number:03d}"
                colour = list(COLOURS)[number % 2]
                pixels = np.clip(np.array(COLOURS[colour]) + draw.integers(-20, 20, (40, 50, 3)), 0, 255)
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
                writer.add(key, buffer.getvalue(), {})
                captions = [f"a {colour} square", f"{colour} thing"]
                split = "test" if number < 3 else "train"
                images.append(
                    Annotation(
                        image_id=f"c/{colour}{key}", source="c", split=split, shard=shard, key=key, captions=captions
                    )
                )
    digests = {path.stem: storage.digest_file(path) for path in paths.SHARDS.glob("*.tar")}
    write_ledger(paths.LEDGER, [], {TARS: json.dumps(digests)})
    storage.write_json(
        paths.split_annotations("train"), dump_annotations([image for image in images if image.split == "train"])
    )
    storage.write_json(paths.IMAGES, [image.model_dump(exclude={"captions", "boxes"}) for image in reversed(images)])
    VOCABULARY.save(paths.VOCABULARY)
    return tmp_path


def run(**changes: Any) -> list[dict[str, str]]:
    options: dict[str, Any] = {
        "weights": "train",
        "small": SMALL,
        "prompt": "",
        "batch_size": 8,
        "precision": "fp32",
        "num_beams": 2,
        "max_length": 4,
        "seed": 3,
        "recovery": RECOVERY,
    }
    blip(shards=paths.SHARDS, prepared=paths.PREPARED, out=paths.captions("blip"), **(options | changes))
    return json.loads(paths.captions("blip").read_text())


def test_a_small_blip_learns_to_caption(root: Path) -> None:
    results = run()
    assert [result["image_id"] for result in results] == sorted(
        image.image_id for image in load_images(paths.IMAGES) if image.split == "test"
    )
    for result in results:
        colour = "red" if "red" in result["image_id"] else "blue"
        assert result["caption"] in (f"a {colour} square", f"{colour} thing")
    assert not any(paths.work_root().rglob("*.npy"))


def train(seed: int, keeper: Checkpointer | None = None, stop_at: int | None = None, precision: str = "fp32") -> bytes:
    """Trains on noise, and gives the weights' bytes. With `stop_at`, step number `stop_at` is interrupted."""
    pixels = np.random.default_rng(0).integers(0, 255, (11, 32, 32, 3)).astype(np.uint8)
    torch.manual_seed(seed)
    model = build_small_blip(SHORT, VOCABULARY, 4)
    task = BlipTask(model, lambda: pixels, [[[4, 5], [6], [4, 7]]] * 11, SHORT, 4, precision, seed)
    take_step = task.train_step

    def train_step(batch: Any, step: int, stop: bool) -> Outcome:
        return take_step(batch, step, stop or step == stop_at)

    task.train_step = train_step  # type: ignore[method-assign]
    Loop(task, Journal(lambda step, metrics: None), 3, keeper).run()
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not_give_the_same_model(root: Path) -> None:
    assert train(1) == train(1)
    assert train(1) != train(2)
    run(small=SHORT)
    first = paths.captions("blip").read_bytes()
    shutil.rmtree(paths.work_root())
    torch.rand(7)
    run(small=SHORT)
    assert paths.captions("blip").read_bytes() == first


@cache
def never_stopped(precision: str) -> bytes:
    return train(1, precision=precision)


@settings(max_examples=6, deadline=None, derandomize=True)
@example(stops=[2, 5], precision="fp32")  # the last steps of both epochs
@example(stops=[3], precision="fp16")  # the loss's scale is a part of the state
@given(stops=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(sorted), precision=st.just("fp32"))
def test_training_that_is_interrupted_ends_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], precision: str
) -> None:
    """2 epochs of 3 steps."""
    folder = tmp_path_factory.mktemp("kept")
    with (folder / "lock").open("w") as lock:

        def keeper() -> Checkpointer:
            return Checkpointer(folder / "kept", "name", RECOVERY, lock.fileno())

        for stop in stops:
            with pytest.raises(Interrupted):
                train(1, keeper(), stop, precision)
            torch.rand(3)
        assert train(1, keeper(), precision=precision) == never_stopped(precision)


KILLED = """
import os, signal, sys
from captioning import blip, blip_training, storage
import test_blip
count, at = 0, int(sys.argv[2])
def counted(function):
    def call(*arguments, **options):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
module = {"blip_training": blip_training, "blip": blip, "storage": storage}[sys.argv[1].partition(".")[0]]
name = sys.argv[1].partition(".")[2]
setattr(module, name, counted(getattr(module, name)))
test_blip.run(small=test_blip.SHORT, batch_size=2)
"""


@pytest.mark.parametrize(
    ("function", "call"),
    [("blip_training.resize", 9), ("blip_training._loss", 25), ("blip._caption_batch", 2), ("storage.write_json", 2)],
)
def test_a_killed_stage_ends_with_the_same_captions(root: Path, function: str, call: int, capsys) -> None:
    """SIGKILL while decoding, in training (2 epochs of 16 steps), between two batches, before publishing."""
    repository = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{repository / 'tests'}"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, function, str(call)], env=environment)
    assert done.returncode == -9 and not paths.captions("blip").exists()
    run(small=SHORT, batch_size=2)
    resumed, out = paths.captions("blip").read_bytes(), capsys.readouterr().out
    assert ("resumed from step" in out) == (function in ("blip_training._loss", "blip._caption_batch"))
    assert ("resumed: 1 of 3 parts verified, 2 left" in out) == (function == "blip._caption_batch")
    assert ("resumed: 3 of 3 parts verified, 0 left" in out) == (function == "storage.write_json")
    assert not list(paths.work_root().rglob("*.tmp"))
    shutil.rmtree(paths.work_root())
    run(small=SHORT, batch_size=2)
    assert paths.captions("blip").read_bytes() == resumed


def parts() -> list[Path]:
    return sorted(paths.work_root().glob("blip/*/parts/*.jsonl"))


def test_finished_parts_are_not_made_again_and_damaged_ones_are_set_aside(
    root: Path, folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(weights=str(folder), batch_size=2)
    before = paths.captions("blip").read_bytes()
    assert len(parts()) == 3
    damaged = parts()[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    captioned: list[int] = []
    caption = blip_module._caption_batch
    monkeypatch.setattr(
        blip_module, "_caption_batch", lambda c, pixels, *o: captioned.append(len(pixels)) or caption(c, pixels, *o)
    )
    run(weights=str(folder), batch_size=2)
    assert captioned == [2] and paths.captions("blip").read_bytes() == before
    out = capsys.readouterr().out
    assert "00001.jsonl was damaged: set aside" in out and "resumed: 2 of 3 parts verified, 1 left" in out
    assert damaged.with_name("00001.jsonl.corrupt").exists()
    run(weights=str(folder), batch_size=2, max_length=2)  # other captions of the same weights
    assert captioned == [2] * 4


def test_a_damaged_shard_is_not_read(root: Path) -> None:
    path = paths.SHARDS / "00001.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 8
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"00001.tar has other bytes .*`dvc repro` again"):
        run(small=SHORT)
    assert not path.exists() and not paths.captions("blip").exists()


def test_captions_are_no_longer_than_asked_and_begin_with_the_prompt(root: Path) -> None:
    results = run(small=SMALL.model_copy(update={"num_epochs": 1}), prompt="Blue a", max_length=1)
    assert all(result["caption"].startswith("blue a") for result in results)
    assert all(len(result["caption"].split()) <= 3 for result in results)


def test_loss_equals_blips_own_with_each_image_repeated() -> None:
    torch.manual_seed(0)
    model = build_small_blip(SMALL, VOCABULARY, 4).eval()
    pixels = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    captions = [[[4, 5, 7], [8]], [[6]]]
    token_ids = torch.tensor([[1, 4, 5, 7, 2], [1, 8, 2, 0, 0], [1, 6, 2, 0, 0]])
    expected = model(
        normalise(pixels[[0, 0, 1]]),
        token_ids,
        (token_ids != 0).long(),
        labels=token_ids.masked_fill(token_ids == 0, -100),
    ).loss
    torch.testing.assert_close(_loss(model, pixels, captions, torch.device("cpu")), expected)


def test_each_epoch_shows_every_image_once_with_other_captions() -> None:
    captions = [[[image, number] for number in range(image % 4 + 1)] for image in range(10)]
    epochs = [list(_draw_batches(captions, 4, 2, 7, epoch)) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(int(i) for indices, _ in epoch for i in indices) == list(range(10))
        for indices, texts in epoch:
            for i, chosen in zip(indices, texts, strict=True):
                assert len({tuple(text) for text in chosen}) == min(2, len(captions[i]))
                assert all(text[0] == i for text in chosen)
    assert str(epochs[0]) != str(epochs[1])
    assert str(epochs[0]) == str(list(_draw_batches(captions, 4, 2, 7, 0)))


def test_fresh_vision_weights_are_not_blank() -> None:
    weights = build_small_blip(SMALL, VOCABULARY, 4).vision_model.state_dict()
    deviations = [value.std().item() for name, value in weights.items() if name.endswith("weight") and value.ndim > 1]
    assert deviations and all(0.015 < deviation < 0.025 for deviation in deviations)


def test_a_decoding_that_was_cut_off_is_made_again_and_a_whole_one_is_reused(root: Path) -> None:
    train = load_annotations(paths.split_annotations("train"))
    rows = {image.image_id: row for row, image in enumerate(train)}
    target = root / "pixels.npy"
    (root / f".{target.name}.tmp").write_bytes(b"half")  # what a killed run leaves
    pixels = store_pixels(target, lambda: iterate_images(paths.SHARDS, train), rows, 16)
    assert pixels.shape == (32, 16, 16, 3)
    colours = ["red" if image[..., 0].mean() > image[..., 2].mean() else "blue" for image in pixels]
    assert [f"a {colour} square" for colour in colours] == [image.captions[0] for image in train]
    again = store_pixels(target, lambda: iter(()), rows, 16)
    np.testing.assert_array_equal(again, pixels)


@pytest.mark.parametrize("damage", ["bit", "cut", "digest", "no digest"])
def test_a_decoding_that_was_damaged_is_set_aside_and_made_anew(root: Path, damage: str) -> None:
    train = load_annotations(paths.split_annotations("train"))
    rows = {image.image_id: row for row, image in enumerate(train)}
    target, note = root / "pixels.npy", root / "pixels.digest"
    pixels = store_pixels(target, lambda: iterate_images(paths.SHARDS, train), rows, 16).copy()
    data, digest = bytearray(target.read_bytes()), note.read_bytes()
    if damage == "bit":
        data[4000] ^= 1
        target.write_bytes(data)
    elif damage == "cut":
        os.truncate(target, 4000)
    elif damage == "digest":
        note.write_bytes(digest.replace(b"a", b"b"))
    else:
        note.unlink()
    again = store_pixels(target, lambda: iterate_images(paths.SHARDS, train), rows, 16)
    np.testing.assert_array_equal(again, pixels)
    assert target.with_name("pixels.npy.corrupt").exists() and note.read_bytes() == digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"patch_px": 12}, "image_px .32. must be a multiple"), ({"num_heads": 5}, "hidden_dim .32. must be a multiple")],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(CapstanError, match=message):
        build_small_blip(SMALL.model_copy(update=changes), VOCABULARY, 4)


def test_a_loss_that_explodes_is_an_error(root: Path) -> None:
    with pytest.raises(CapstanError, match="Lower the learning rate"):
        run(small=SMALL.model_copy(update={"learning_rate": 1e30}))
    assert not paths.captions("blip").exists()


def test_precision_by_name() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == torch.float32 and choose_precision("bf16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)


def test_images_that_are_not_where_they_should_be(root: Path) -> None:
    image = load_images(paths.IMAGES)[0]
    with pytest.raises(CapstanError, match=r"00007.tar is missing.*dvc repro download"):
        list(iterate_images(paths.SHARDS, [image.model_copy(update={"shard": "00007"})]))
    with pytest.raises(CapstanError, match=r"lacks 1 images \(nokey"):
        list(iterate_images(paths.SHARDS, [image.model_copy(update={"key": "nokey"})]))


def test_no_test_images_and_no_train_images(root: Path) -> None:
    images = storage.read_json(paths.IMAGES)
    storage.write_json(paths.split_annotations("train"), [])
    with pytest.raises(CapstanError, match=r"train.json has no captions"):
        run()
    storage.write_json(paths.IMAGES, [image for image in images if image["split"] != "test"])
    with pytest.raises(CapstanError, match="no image of the test split"):
        run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP with its processor as `save_pretrained` writes them."""
    from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "##s", "[DEC]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    torch.manual_seed(5)
    model = build_small_blip(SMALL, Vocabulary([*VOCABULARY.words, "x", "y"], 4), 20)
    text = model.config.text_config
    text.bos_token_id, text.eos_token_id, text.sep_token_id, text.pad_token_id = 10, 3, 3, 0
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_local_folder_captions_as_transformers_does(root: Path, folder: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    results = run(weights=str(folder), max_length=5, prompt="a red")
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    test = [image for image in load_images(paths.IMAGES) if image.split == "test"]
    expected = []
    for image, pixels in iterate_images(paths.SHARDS, test):
        inputs = processor(images=pixels.copy(), text="a red", return_tensors="pt")
        row = model.generate(**inputs, num_beams=2, max_new_tokens=5)[0]
        expected.append({"image_id": image.image_id, "caption": processor.decode(row, skip_special_tokens=True)})
    assert results == sorted(expected, key=lambda result: result["image_id"])
    assert all(result["caption"].startswith("a red") for result in results), results
    assert all("caption" in result for result in run(weights=str(folder)))  # without a prompt


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "pickle":
        from safetensors.torch import load_file

        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "a weight less":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["vision_model.embeddings.class_embedding"]
        save_file(tensors, weights, {"format": "pt"})
    elif how == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["hidden_size"] = 64
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "other model":
        from transformers import BertConfig, BertModel

        weights.unlink()
        BertModel(BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
            folder
        )
    elif how == "no processor":
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).unlink(missing_ok=True)
    else:
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "pickle",
        "truncated",
        "a weight less",
        "other sizes",
        "other model",
        "no processor",
        "broken config",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_local_folder_that_is_no_whole_blip_is_an_error(folder: Path, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy, how)
    with pytest.raises(CapstanError, match="blip.weights"):
        load_pretrained(copy, "")


def test_every_image_is_captioned_whatever_the_batch(root: Path) -> None:
    torch.manual_seed(1)
    captioner = as_captioner(build_small_blip(SMALL, VOCABULARY, 4), SMALL, VOCABULARY, "")
    images = load_images(paths.IMAGES)[:7]

    def captions(batch_size: int) -> dict[str, str]:
        options: dict[str, Any] = {"prompt": "", "precision": "fp32", "num_beams": 2, "max_length": 4}
        parts = root / f"parts {batch_size}"
        return caption_images(lambda: captioner, paths.SHARDS, images, parts, batch_size=batch_size, **options)

    assert captions(3) == captions(7) and len(captions(3)) == 7

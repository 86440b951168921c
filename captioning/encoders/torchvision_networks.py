"""torchvision's classifiers as encoders: cut before their pooling, with the transform of their weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from captioning import storage
from captioning.encoders.base import Backbone, Transform
from captioning.encoders.weights import hub_file, load_into, load_state_dict
from captioning.errors import CapstanError

# Written down, not asked for: importing torchvision takes a second. A test compares.
NAMES = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
    efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf
    regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf
    regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34
    resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn
    vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2
    wide_resnet50_2
""".split()

AUXILIARY = ("AuxLogits", "aux1", "aux2")
"""Classifiers for training alone."""
Stages = dict[str, list[nn.Module]]


def build_torchvision(name: str, weights: str, param: str) -> tuple[nn.Module, Transform, str]:
    """See `build_encoder`."""
    from torchvision import models

    if weights == "package":
        raise CapstanError(f"{param}: no installed package ships {name}'s weights; use `hub`, `random` or a path")
    known = models.get_model_weights(name).DEFAULT
    asked = known.transforms()
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # takes seconds, and without this argument they warn of it
    if name.startswith("vit"):
        options["image_size"] = asked.crop_size[0]
    network = models.get_model(name, weights=None, **options)
    digest = "random"
    if weights != "random":
        path = hub_file(known.url, param) if weights == "hub" else Path(weights)
        _load(network, load_state_dict(path, param), str(path), param)
        digest = storage.digest_file(path)
    transform = _transform(network, asked)
    return _backbone(network, name, transform.image_px), transform, digest


def _load(network: nn.Module, state: dict[str, Tensor], path: str, param: str) -> None:
    *kept, (head, _) = network.named_children()  # in all of them the classifier comes last
    body = nn.Module()  # not the network itself: mnasnet refuses state dicts without torch's own metadata
    for name, child in kept:
        if name not in AUXILIARY:
            body.add_module(name, child)
    for name, parameter in network.named_parameters(recurse=False):
        body.register_parameter(name, parameter)
    state = {_renamed(name): value for name, value in state.items() if name.split(".")[0] not in AUXILIARY}
    load_into(body, state, path, param, head=f"{head}.")


def _renamed(name: str) -> str:
    """Files older than torchvision's present vision transformers."""
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _transform(network: nn.Module, asked: Any) -> Transform:
    """The whole image at the size that the weights' transform crops to. The margin that it cuts off stays in."""
    (image_px,), mean, std = asked.crop_size, tuple(asked.mean), tuple(asked.std)
    if hasattr(network, "transform_input"):  # they turn ImageNet's normalisation, which all transforms have, into this
        mean = std = (0.5, 0.5, 0.5)
    return Transform(image_px, mean, std, asked.interpolation.value)


def _backbone(network: nn.Module, name: str, image_px: int) -> nn.Module:
    for family, cut in FAMILIES.items():
        if name.startswith(family):
            return Backbone(cut(network))
    return ExtractedBackbone(network, image_px)


def _starting(blocks: Iterable[nn.Module], starts: Callable[[nn.Module], bool]) -> list[list[nn.Module]]:
    """Splits a sequence before each block that `starts`."""
    parts: list[list[nn.Module]] = []
    for block in blocks:
        if starts(block) or not parts:
            parts.append([])
        parts[-1].append(block)
    return parts


def _numbered(parts: Iterable[Iterable[nn.Module]], name: str = "stage") -> Stages:
    return {f"{name}{number}": list(blocks) for number, blocks in enumerate(parts, 1)}


def _cut_resnet(network: Any) -> Stages:
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    layers = (network.layer1, network.layer2, network.layer3, network.layer4)
    return {"stem": [stem], **_numbered(layers, "layer")}


def _cut_pooled(network: Any) -> Stages:
    """AlexNet, VGG and SqueezeNet: a stage ends where it pools."""
    layers = list(network.features)
    ends = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    bounds = sorted({0, *ends, len(layers)})
    return _numbered([[nn.Sequential(*layers[first:end])] for first, end in pairwise(bounds)], "block")


def _cut_densenet(network: Any) -> Stages:
    layers = dict(network.features.named_children())
    stages: Stages = {"stem": [nn.Sequential(*(layers[f"{kind}0"] for kind in ("conv", "norm", "relu", "pool")))]}
    for n in range(1, 5):
        transition = [layers[f"transition{n - 1}"]] if n > 1 else []
        stages[f"block{n}"] = [*transition, layers[f"denseblock{n}"]]
    stages["block4"].append(nn.Sequential(layers["norm5"], nn.ReLU()))
    return stages


def _cut_inception(network: Any) -> Stages:
    """GoogLeNet and Inception v3: stages by the numbers of their modules, such as Mixed_6b and inception4a."""
    stages: Stages = {"stem": []}
    for name, child in network.named_children():
        if name == "avgpool":
            break
        if found := re.match(r"(?:Mixed_|inception)(\d)", name):
            stages.setdefault(f"inception{found[1]}", [])
        if name not in AUXILIARY:
            stages[list(stages)[-1]].append(child)
    return stages


def _cut_efficientnet(network: Any) -> Stages:
    stem, *stages, head = network.features
    return {"stem": [stem], **_numbered(stages), "head": [head]}


def _cut_mobilenet(network: Any) -> Stages:
    """A stage begins with a block that has no way around it, since it changes the size of its input."""
    stem, *blocks, head = network.features
    return {"stem": [stem], **_numbered(_starting(blocks, lambda block: not block.use_res_connect)), "head": [head]}


def _cut_mnasnet(network: Any) -> Stages:
    layers = network.layers
    return {"stem": [layers[:8]], **_numbered(layers[8:14]), "head": [layers[14:]]}


def _cut_convnext(network: Any) -> Stages:
    """ConvNeXt and Swin: a stage is a module that halves the grid, but for the first, and a sequence of blocks."""
    stem, first, *rest = network.features
    halved = [[halving, *blocks] for halving, blocks in zip(rest[::2], rest[1::2], strict=True)]
    return {"stem": [stem], **_numbered([first, *halved])}


def _cut_swin(network: Any) -> Stages:
    stages = _cut_convnext(network)
    stages["stage4"].append(nn.Sequential(network.norm, network.permute))
    return stages


def _cut_regnet(network: Any) -> Stages:
    return {"stem": [network.stem], **{name: list(part) for name, part in network.trunk_output.named_children()}}


def _cut_maxvit(network: Any) -> Stages:
    return {"stem": [network.stem], **_numbered(block.layers for block in network.blocks)}


def _cut_vit(network: Any) -> Stages:
    stages: Stages = {
        "patches": [_Patches(network)],
        **_numbered(([layer] for layer in network.encoder.layers), "layer"),
    }
    stages[list(stages)[-1]].append(network.encoder.ln)
    return stages


class _Patches(nn.Module):
    """What a vision transformer does before its layers (https://arxiv.org/abs/2010.11929, eq. 1)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv_proj, self.class_token = network.conv_proj, network.class_token
        self.pos_embedding = network.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, image_px, image_px) → (batch, 1 + num_patches, hidden_dim), the class token first."""
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = self.class_token.expand(len(patches), -1, -1)
        return torch.cat([tokens, patches], 1) + self.pos_embedding


FAMILIES: dict[str, Callable[[Any], Stages]] = {
    **dict.fromkeys(("alexnet", "vgg", "squeezenet"), _cut_pooled),
    **dict.fromkeys(("resnet", "resnext", "wide_resnet"), _cut_resnet),
    **dict.fromkeys(("googlenet", "inception"), _cut_inception),
    "densenet": _cut_densenet,
    "efficientnet": _cut_efficientnet,
    "mobilenet": _cut_mobilenet,
    "mnasnet": _cut_mnasnet,
    "convnext": _cut_convnext,
    "swin": _cut_swin,
    "regnet": _cut_regnet,
    "maxvit": _cut_maxvit,
    "vit": _cut_vit,
}
"""By the beginning of their names. Others are cut by torchvision's feature extractor."""


class ExtractedBackbone(nn.Module):
    """The part of any classifier that torch.fx can trace, up to the last grid in it. Its stages are the network's
    children. Gradient checkpointing changes nothing: it would be one single block.

    Raises:
        ValueError: no grid.
    """

    checkpointed = False

    def __init__(self, network: nn.Module, image_px: int) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        super().__init__()
        network.eval()
        both = create_feature_extractor(network, {_last_grid(network, image_px): "grid"}).eval()
        self.network = fx.GraphModule(both, both.graph)  # of `both`, a copy would be in training mode
        self.stages = tuple(dict.fromkeys(self.stage_of(name) for name, _ in self.named_parameters()))

    def stage_of(self, parameter_name: str) -> str:
        return parameter_name.split(".")[1]

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, image_px, image_px) → (batch, encoder_dim, height, width)."""
        return self.network(images)["grid"]


def _last_grid(network: nn.Module, image_px: int) -> str:
    """The last node of the network's graph that gives maps of more than one pixel."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    _, *nodes = get_graph_node_names(network)[1]  # without the image itself
    graph = create_feature_extractor(network, nodes)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in graph.state_dict().items()}
    image = torch.empty(1, 3, image_px, image_px, device="meta")
    with torch.no_grad():
        outputs = torch.func.functional_call(graph, shapes, (image,))
    grids = [node for node in nodes if isinstance(v := outputs[node], Tensor) and v.dim() == 4 and v[0, 0].numel() > 1]
    if not grids:
        raise ValueError(f"{type(network).__name__} has no grid of regions")
    return grids[-1]

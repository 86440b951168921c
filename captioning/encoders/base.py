"""What all encoders share: the transform that makes images their input, stages of blocks, and regions in rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captioning import storage
from captioning.errors import CapstanError

if TYPE_CHECKING:
    import numpy as np

Grid = tuple[int, int]
"""(height, width)"""
Trainable = Literal["none", "all"] | int | Sequence[str]

REVISION = 2
"""Of how images become features: raised when the same weights give other bits. 2: torch's resize, fused on a CPU."""


@dataclass(frozen=True)
class Transform:
    """How an image becomes a network's input: resized (antialiased, aspect ratio not kept: nothing that a caption names
    is cropped away), then `(pixel / 255 - mean) / std` for each channel."""

    image_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def resize(self, image: np.ndarray) -> np.ndarray:
        """HWC uint8 RGB of any size → (image_px, image_px, 3) uint8."""
        size = (self.image_px, self.image_px)
        if image.shape[:2] == size:
            return image
        image = image if image.flags.writeable else image.copy()  # torch warns of memory that it may not write to
        # Pillow's algorithm in a third of its time; the two differ by one level in 1 of 400 values.
        channels = torch.from_numpy(image).permute(2, 0, 1)[None]
        small = nn.functional.interpolate(channels, size, mode=self.interpolation, antialias=True)
        return small[0].permute(1, 2, 0).numpy()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 → (batch, 3, image_px, image_px) float32, channels_last in memory."""
        batch, height, width, _ = pixels.shape
        # Whole rows at a time: three channels alone are too few for the processor's vectors.
        mean, std = ((torch.tensor(v, device=pixels.device) * 255).repeat(width) for v in (self.mean, self.std))
        rows = pixels.reshape(batch, height, width * 3).float().sub_(mean).div_(std)
        return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)

    def describe(self) -> dict[str, Any]:
        """As plain values. Lists, as they come back from a file: what is described must equal what was stored."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @property
    def digest(self) -> str:
        """xxh3-128 of `describe()`: two encoders with the same one see the same pixels."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(storage.dump_json(self.describe()))


class Backbone(nn.Sequential):
    """A network without its classifier: stages from input to output, each a sequence of blocks.

    Stages are what fine-tuning chooses by, blocks what gradient checkpointing computes twice. No block may change its
    input in place.
    """

    checkpointed = False

    def __init__(self, stages: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__(OrderedDict((name, nn.Sequential(*blocks)) for name, blocks in stages.items()))

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def stage_of(self, parameter_name: str) -> str:
        return parameter_name.partition(".")[0]

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, image_px, image_px) → (batch, encoder_dim, height, width), or, with a class token, which comes
        first, (batch, 1 + height * width, encoder_dim)."""
        values = images
        for stage in self.children():
            for block in stage.children():
                values = run_block(block, values, self.checkpointed)
        return values


def run_block(block: nn.Module, values: Tensor, checkpointed: bool) -> Tensor:
    """block(values); `checkpointed`: only its input is kept for the backward pass, which computes the rest again."""
    if not checkpointed or not torch.is_grad_enabled():
        return block(values)
    if not values.requires_grad and not any(parameter.requires_grad for parameter in block.parameters()):
        return block(values)
    # No block draws random numbers: dropout is off, see Encoder.train.
    return checkpoint(block, values, use_reentrant=False, preserve_rng_state=False)


class Encoder(nn.Module):
    """A backbone with its transform. Built frozen and in evaluation mode; `unfreeze` chooses stages to train.

    Attributes:
        transform: makes images the network's input.
        grid: (height, width) of the region grid; regions run row by row.
        num_extra: 1 with a class token, which then comes before the grid's regions; else 0.
        encoder_dim: channels of a region.
        weights_digest: xxh3-128 of the weights file, or `random`.
    """

    pooling: Tensor | None

    def __init__(
        self,
        name: str,
        backbone: Any,
        transform: Transform,
        weights_digest: str,
        grid: Sequence[int] | None = None,
        class_token: bool = False,
    ) -> None:
        """`backbone`: a Backbone, or what has its attributes. `grid`, `class_token`: see `build_encoder`."""
        super().__init__()
        self.name, self.backbone, self.transform, self.weights_digest = name, backbone, transform, weights_digest
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.encoder_dim, self._own_grid, has_class_token = _measure(backbone, transform.image_px)
        self.grid: Grid = self._own_grid if grid is None else (grid[0], grid[1])
        self.num_extra = int(class_token and has_class_token)
        pooling = None if self.grid == self._own_grid else _pooling_matrix(self._own_grid, self.grid)
        self.register_buffer("pooling", pooling, persistent=False)

    @property
    def num_regions(self) -> int:
        return self.grid[0] * self.grid[1] + self.num_extra

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, image_px, image_px, 3) uint8 → (batch, num_regions, encoder_dim), regions row by row."""
        return self.to_regions(self.backbone(self.transform.normalise(pixels)))

    def to_regions(self, features: Tensor) -> Tensor:
        """A backbone's output → (batch, num_regions, encoder_dim), pooled to the grid that was asked for."""
        num_tokens = 1 if features.dim() == 3 else 0
        regions = features[:, num_tokens:] if num_tokens else features.flatten(2).transpose(1, 2)
        if (num_found := regions.shape[1]) != self._own_grid[0] * self._own_grid[1]:
            raise ValueError(f"{self.name}: {num_found} regions, expected a grid of {self._own_grid}")
        if self.pooling is not None:
            regions = self.pooling.to(regions.dtype) @ regions
        return torch.cat([features[:, : self.num_extra], regions], 1) if self.num_extra else regions

    def train(self, mode: bool = True) -> Encoder:
        """Sets the mode of the encoder alone, never of what it is made of: batch normalisation keeps its statistics
        (a batch of captioned images is no sample of ImageNet), and dropout and stochastic depth stay off."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def checkpointed(self) -> bool:
        """Whether blocks that gradients flow through are computed again in the backward pass, to save memory."""
        return self.backbone.checkpointed

    @checkpointed.setter
    def checkpointed(self, value: bool) -> None:
        self.backbone.checkpointed = value

    @property
    def stages(self) -> tuple[str, ...]:
        """From input to output."""
        return self.backbone.stages

    def stage_of(self, parameter_name: str) -> str:
        """The stage that a parameter belongs to, named as in `named_parameters()`."""
        return self.backbone.stage_of(parameter_name.removeprefix("backbone."))

    def choose_stages(self, trainable: Trainable) -> tuple[str, ...]:
        """The stages that `trainable` means, input to output: `none`, `all`, the last so many, or those named.

        Raises:
            CapstanError: there are not as many, or none of that name; lists the stages.
        """
        if trainable in ("none", "all"):
            return self.stages if trainable == "all" else ()
        param, listed = f"encoder_settings.{self.name}.trainable", f"Stages, input to output: {', '.join(self.stages)}"
        if isinstance(trainable, int):
            if not 0 < trainable <= len(self.stages):
                raise CapstanError(
                    f"{param}: {trainable}, but {self.name} has 1 to {len(self.stages)} stages to train. {listed}"
                )
            return self.stages[-trainable:]
        names = [trainable] if isinstance(trainable, str) else list(trainable)
        if unknown := [name for name in names if name not in self.stages]:
            raise CapstanError(f"{param}: {self.name} has no stage {', '.join(map(repr, unknown))}. {listed}")
        return tuple(stage for stage in self.stages if stage in names)

    def unfreeze(self, stages: Sequence[str]) -> None:
        """Makes exactly the parameters of these stages learn, batch normalisation's scales and shifts included."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.stage_of(name) in stages)

    def describe(self) -> dict[str, Any]:
        """What features and models record of their encoder; `rebuild_encoder` makes its like."""
        return {
            "name": self.name,
            "revision": REVISION,
            "encoder_dim": self.encoder_dim,
            "grid": list(self.grid),
            "pooled_from": None if self.pooling is None else list(self._own_grid),
            "class_token": bool(self.num_extra),
            "weights_digest": self.weights_digest,
            "transform": self.transform.describe(),
        }


def _measure(backbone: nn.Module, image_px: int) -> tuple[int, Grid, bool]:
    """(encoder_dim, grid, whether there is a class token), from a forward pass that computes shapes alone."""
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty(1, 3, image_px, image_px, device="meta")
    with torch.no_grad():
        found = torch.func.functional_call(backbone, shapes, (image,)).shape
    if len(found) == 4:
        return found[1], (found[2], found[3]), False
    side = isqrt(found[1] - 1)
    assert side * side == found[1] - 1, found
    return found[2], (side, side), True


def _pooling_matrix(own: Grid, asked: Grid) -> Tensor:
    """(regions asked, own regions): adaptive average pooling as a product, which has a deterministic gradient on GPUs
    where torch's own pooling has none."""
    rows, columns = (_averages(n, m) for n, m in zip(own, asked, strict=True))
    return torch.kron(rows, columns)


def _averages(num_inputs: int, num_outputs: int) -> Tensor:
    """(num_outputs, num_inputs); output i is the mean of inputs ⌊i n / m⌋ to ⌈(i + 1) n / m⌉, as torch has it."""
    weights = torch.zeros(num_outputs, num_inputs, device="cpu")
    for i in range(num_outputs):
        first, end = i * num_inputs // num_outputs, -(-(i + 1) * num_inputs // num_outputs)
        weights[i, first:end] = 1 / (end - first)
    return weights

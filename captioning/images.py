"""Images from anywhere made safe and plain: checked before decoding, upright, 8-bit RGB, JPEG.

Decided here, for every source alike: the first frame of an animation counts; EXIF orientation is applied; transparency
lies on white; 16-bit and CMYK become 8-bit RGB; colour profiles are not applied. Pillow decides what an image is, from
its bytes and never from its name.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from captioning.errors import CapstanError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The number of pixels is checked below against the caller's own limit, before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# Few, common decoders: each one more is one more to attack.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
"""What `decode_image` accepts unless told otherwise: 300 MB as RGB."""
MIN_SIDE_PX = 16
"""A smaller image is a tracking pixel or an icon, not a scene."""
MAX_ASPECT_RATIO = 20


class ImageError(CapstanError):
    """An image that cannot be used. `reason` is short and the same for all images with the same fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class StoredImage:
    """A JPEG as it stands in a shard."""

    jpeg: bytes
    width: int
    height: int


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header and checks the size; decodes nothing yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception:  # noqa: BLE001  hostile headers make decoders raise anything
        raise ImageError("damaged image") from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too many pixels")
    return image


def _load(image: Image.Image) -> Image.Image:
    """Decodes, and turns the image upright."""
    try:
        image.load()
    except OSError as error:
        raise ImageError("truncated image" if "truncated" in str(error) else "damaged image") from None
    except Exception:  # noqa: BLE001
        raise ImageError("damaged image") from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  an unreadable EXIF block does not make the picture worse
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image))
        pixels = pixels * (255 if pixels.max(initial=0) <= 1 else 1)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion cuts at 255 instead of scaling
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _plain(image: Image.Image) -> Image.Image:
    upright = _load(image)
    try:
        return _to_rgb(upright)
    except Exception:  # noqa: BLE001
        raise ImageError("damaged image") from None


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of an encoded image.

    Args:
        data: an encoded image of one of `FORMATS`.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (height, width, 3) RGB uint8, upright.

    Raises:
        ImageError: not an image, damaged, or too large.
    """
    return np.asarray(_plain(_open(data, max_pixels)))


def normalise_image(data: bytes, image_px: int, jpeg_quality: int, max_pixels: int) -> StoredImage:
    """The image as shards store it: upright RGB, the shorter side at most `image_px` pixels, JPEG.

    The same bytes give the same JPEG (for one version of Pillow).

    Raises:
        ImageError: not an image, damaged, too large, too small, or too elongated.
    """
    image = _open(data, max_pixels)
    short, long = sorted(image.size)
    if short < MIN_SIDE_PX:
        raise ImageError("too small")
    if long > MAX_ASPECT_RATIO * short:
        raise ImageError("too elongated")
    if image.format == "JPEG" and short >= 4 * image_px:
        # libjpeg decodes at 1/2, 1/4 or 1/8; twice the wanted size leaves the filter below its full quality.
        image.draft(None, (2 * image_px * image.width // short, 2 * image_px * image.height // short))
    plain = _plain(image)
    short = min(plain.size)
    if short > image_px:
        width, height = (max(1, round(side * image_px / short)) for side in plain.size)
        plain = plain.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # A bare copy of the pixels: `plain.info` may hold profiles and comments of the original.
    Image.fromarray(np.asarray(plain)).save(buffer, "JPEG", quality=jpeg_quality)
    return StoredImage(buffer.getvalue(), plain.width, plain.height)

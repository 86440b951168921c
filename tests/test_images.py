"""Hostile and odd images."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import encoded, jpeg, picture
from PIL import Image

from captioning.images import ImageError, decode_image, normalise_image

LIMIT = 1_000_000


def stored(data: bytes, image_px: int = 64, max_pixels: int = LIMIT) -> np.ndarray:
    image = normalise_image(data, image_px, 95, max_pixels)
    pixels = decode_image(image.jpeg, LIMIT)
    assert pixels.shape == (image.height, image.width, 3) and pixels.dtype == np.uint8
    assert Image.MAX_IMAGE_PIXELS is None
    return pixels


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        stored(data, **options)
    return caught.value.reason


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 6) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).mean()) < tolerance


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that say they are a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_refusals():
    assert reason(png_bomb(20000, 20000)) == "too many pixels"
    assert reason(b"<!DOCTYPE html><html><body>404</body></html>") == "not an image"
    assert reason(b"") == "not an image"
    assert reason(encoded(picture(1, 1), "PNG")) == "too small"
    assert reason(encoded(picture(700, 20), "PNG")) == "too elongated"
    whole = encoded(picture(200, 200))
    assert reason(whole[: len(whole) // 2]) == "truncated image"
    assert reason(encoded(picture(200, 200), "PNG")[:2000]) in ("truncated image", "damaged image")
    assert reason(png_bomb(100, 100)) in ("truncated image", "damaged image")


def test_size_keeps_the_aspect_ratio_and_never_enlarges():
    assert stored(jpeg(0, 300, 150)).shape == (64, 128, 3)
    assert stored(jpeg(0, 150, 300)).shape == (128, 64, 3)
    assert stored(jpeg(0, 40, 50)).shape == (50, 40, 3)
    assert stored(jpeg(0, 900, 600)).shape == (64, 96, 3)  # libjpeg's reduced decoding


def test_reduced_decoding_shows_the_same():
    big = picture(1000, 750)
    assert close(stored(encoded(big)), np.asarray(big.resize((85, 64), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    upright = picture(60, 40)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the orientation undoes
    turned = upright.transpose(Image.Transpose(inverse[orientation])) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(turned, exif=exif, quality=95)
    assert close(stored(data), np.asarray(upright))
    assert close(decode_image(data, LIMIT), np.asarray(upright))


def test_modes_become_rgb():
    rgb = picture(40, 30)
    grey = rgb.convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert close(stored(encoded(rgb.convert("CMYK"))), np.asarray(rgb))
    assert close(stored(encoded(grey)), np.asarray(grey.convert("RGB")))
    assert close(stored(encoded(wide, "PNG")), np.asarray(grey.convert("RGB")))
    assert close(stored(encoded(wide, "TIFF")), np.asarray(grey.convert("RGB")))
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    assert close(stored(encoded(floats, "TIFF")), np.asarray(grey.convert("RGB")))
    assert close(stored(encoded(rgb.quantize(64), "PNG")), np.asarray(rgb), 20)
    bits = grey.convert("1")
    assert close(stored(encoded(bits, "PNG")), np.asarray(bits.convert("RGB")), 20)


def test_transparency_lies_on_white():
    layer = picture(40, 30).convert("RGBA")
    layer.putalpha(0)
    assert close(stored(encoded(layer, "PNG")), np.full((30, 40, 3), 255))
    assert close(stored(encoded(layer, "WEBP", lossless=True)), np.full((30, 40, 3), 255))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert close(stored(data), np.asarray(frames[0]))


def test_same_bytes_same_jpeg_and_nothing_of_the_original_stays():
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = encoded(picture(), exif=exif, comment=b"private")
    first, second = (normalise_image(data, 64, 95, LIMIT).jpeg for _ in range(2))
    assert first == second
    assert b"where I live" not in first and b"private" not in first


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7), st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
def test_a_flipped_bit_gives_an_image_or_an_image_error(position: int, bit: int, kind: str):
    data = bytearray(encoded(picture(), kind))
    data[position % len(data)] ^= 1 << bit
    try:
        stored(bytes(data))
    except ImageError as error:
        assert error.reason

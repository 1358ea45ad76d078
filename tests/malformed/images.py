"""What may be wrong with an image or a label map, and what only looks wrong: rows of file contents."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 12, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SMOOTH = np.stack([*np.indices((HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH), dtype=int)], -1) * 20
"""An image that JPEG keeps: red grows downwards, green to the right."""


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def image(array: Any = PIXELS) -> Image.Image:
    return Image.fromarray(np.asarray(array).astype(np.uint8))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(64))) + _chunk(b"IEND", b"")


PNG, JPEG, GIF = encoded(image(), "PNG"), encoded(image(), "JPEG"), encoded(image(), "GIF")
WEBP, TIFF, BMP = encoded(image(), "WEBP"), encoded(image(), "TIFF"), encoded(image(), "BMP")


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x89",
    "zeros": bytes(2000),
    "text": b"this is no image\n" * 20,
    "a page of a server": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "JSON": b'{"message": "not found"}',
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "ZIP": b"PK\x03\x04" + bytes(60),
    "only the signature of PNG": PNG[:8],
    "PNG without its pixels": PNG[:33],
    "half a PNG": PNG[: len(PNG) // 2],
    "PNG with other bytes inside": _flipped(PNG, 50),
    "PNG with a wrong checksum": _flipped(PNG, 30),
    "PNG of no pixels": png_of_size(0, 8),
    "PNG of too few pixels": png_of_size(300, 300),
    "PNG of too many pixels": png_of_size(50_000, 50_000),
    "only the start of JPEG": JPEG[:4],
    "JPEG without its pixels": JPEG[: JPEG.index(b"\xff\xda")],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "JPEG of too many pixels": JPEG.replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 65_500, 65_500), 1),
    "half a GIF": GIF[: len(GIF) // 2],
    "GIF without images": GIF[:13] + b";",
    "half a WEBP": WEBP[: len(WEBP) // 2],
    "half a TIFF": TIFF[: len(TIFF) // 2],
    "half a BMP": BMP[: len(BMP) // 2],
    "numbers of 32 bits": encoded(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF"),
    "numbers with a point": encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
}
"""What no reader may take for an image."""

PLACES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}
"""What may have become of a file since it was listed."""


def _sixteen(order: str) -> bytes:
    """A PGM of 16 bits, or a PNG or TIFF."""
    values = (SMOOTH[..., 0].astype(np.uint16) << 8) + 7
    if order == "PPM":
        return b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + values.astype(">u2").tobytes()
    return encoded(Image.fromarray(values), order)


def _exif(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif, "quality": 95, "subsampling": 0}


_GREY = np.repeat(SMOOTH[..., :1], 3, 2)
_PALETTE = image(PIXELS).quantize(16)
_TURNED: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
"""EXIF's orientation -> how a camera held so stores what is seen."""

ODD: dict[str, tuple[bytes, Any, int]] = {
    "1 x 1": (encoded(image(PIXELS[:1, :1]), "PNG"), PIXELS[:1, :1], 0),
    "1 x 400": (encoded(image(np.zeros((400, 1, 3))), "PNG"), np.zeros((400, 1, 3)), 0),
    "16 bits, PNG": (_sixteen("PNG"), _GREY, 0),
    "16 bits, TIFF": (_sixteen("TIFF"), _GREY, 0),
    "16 bits, PGM": (_sixteen("PPM"), _GREY, 0),
    "grey": (encoded(image(SMOOTH[..., 0]), "PNG"), _GREY, 0),
    "1 bit": (
        encoded(image(255 * (PIXELS[..., 0] > 99)).convert("1"), "PNG"),
        np.repeat(255 * (PIXELS[..., :1] > 99), 3, 2),
        0,
    ),
    "grey with transparency": (
        encoded(Image.merge("LA", (image(SMOOTH[..., 0]), image(PIXELS[..., 1]))), "PNG"),
        _GREY,
        0,
    ),
    "palette": (encoded(_PALETTE, "PNG"), np.asarray(_PALETTE.convert("RGB")), 0),
    "palette with transparency": (
        encoded(_PALETTE, "PNG", transparency=bytes([0, 99] * 8)),
        np.asarray(_PALETTE.convert("RGB")),
        0,
    ),
    "palette with one transparent colour": (
        encoded(_PALETTE, "PNG", transparency=3),
        np.asarray(_PALETTE.convert("RGB")),
        0,
    ),
    "RGBA": (encoded(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), "PNG"), PIXELS, 0),
    "CMYK": (
        encoded(image(SMOOTH).convert("CMYK"), "JPEG", quality=100, subsampling=0),
        SMOOTH,
        8,
    ),
    "progressive": (encoded(image(SMOOTH), "JPEG", quality=95, subsampling=0, progressive=True), SMOOTH, 8),
    "animation": (
        encoded(_PALETTE, "GIF", save_all=True, append_images=[_PALETTE.rotate(180)]),
        np.asarray(_PALETTE.convert("RGB")),
        0,
    ),
    "another ending": (BMP, PIXELS, 0),
    "bytes after the end": (PNG + b"trailing" * 20, PIXELS, 0),
    "broken notes of the camera": (
        encoded(image(SMOOTH), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\xff"),
        SMOOTH,
        8,
    ),
    "unknown orientation": (encoded(image(SMOOTH), "JPEG", **_exif(77)), SMOOTH, 8),
    **{
        f"orientation {number}": (
            encoded(image(np.ascontiguousarray(_TURNED[number](SMOOTH))), "JPEG", **_exif(number)),
            SMOOTH,
            8,
        )
        for number in _TURNED
    },
}
"""What looks wrong and is an image: contents, the pixels that are seen, and by how much they may differ (JPEG)."""

MAPS: dict[str, Callable[[], Image.Image]] = {
    "of another size": lambda: Image.new("L", (WIDTH - 1, HEIGHT), 1),
    "turned": lambda: Image.new("L", (HEIGHT, WIDTH), 1),
    "in colours": lambda: Image.new("RGB", (WIDTH, HEIGHT), (1, 1, 1)),
    "with transparency": lambda: Image.new("LA", (WIDTH, HEIGHT), (1, 255)),
    "a label above the classes": lambda: Image.new("L", (WIDTH, HEIGHT), 4),
    "a label of 16 bits above the classes": lambda: Image.fromarray(np.full((HEIGHT, WIDTH), 300, dtype=np.uint16)),
}
"""Label maps that can be read, and are wrong for 3 classes."""

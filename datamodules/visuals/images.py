"""Image bytes -> an upright RGB picture with 8 bits per channel, on white where transparent."""

import io
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from datamodules.errors import BadSampleError

#: Maximum pixels of a picture or frame to decode: 8K video.
MAX_PIXELS = 7680 * 4320

_JPEG_SCANS = 200  # a progressive JPEG has about ten; each scan is a pass over the whole picture
_FORMATS = ("JPEG", "PNG", "WEBP")

# First bytes of other files that occur under the name of a picture or a video.
_BEGINNINGS = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"#EXTM3U", "a playlist"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
)
# Brands of files that begin like MP4; `mif1` and `msf1` may be AVIF or HEIC.
_BRANDS = {
    **dict.fromkeys([b"avif", b"avis"], "an AVIF image"),
    **dict.fromkeys([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"], "a HEIC image"),
    **dict.fromkeys([b"mif1", b"msf1"], "an AVIF or HEIC image"),
}
_TEXTS = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file"),
    (b"{", "a JSON file"),
)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns a picture in mode RGB, rotated by its Exif orientation.

    Args:
        data: a JPEG, PNG or WebP file. Only the first picture of an animation is used.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        BadSampleError: image_unreadable, image_too_large.
    """
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > _JPEG_SCANS:
        raise BadSampleError("image_too_large", f"{scans} scans, the limit is {_JPEG_SCANS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata; this function checks the size
            # Allow only these formats: Pillow has others that start programs.
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise BadSampleError("image_too_large", f"{width} x {height}")
            return _as_rgb(_turned(picture))
    except BadSampleError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise BadSampleError("image_too_large", str(error)) from None
    except Exception as error:  # Pillow's readers of broken files raise nearly anything
        kind = kind_of(data)
        if not data:
            text = "0 bytes"
        elif kind and not is_image(data):
            text = f"it is {kind}; a JPEG, PNG or WebP image is expected"
        else:
            text = f"{type(error).__name__}: {str(error).split('<')[0].strip()}"
        raise BadSampleError("image_unreadable", text) from None


def is_image(data: bytes) -> bool:
    """Returns True if the bytes begin like a format that `open_image` reads."""
    return kind_of(data) in ("a JPEG image", "a PNG image", "a WebP image")


def kind_of(data: bytes) -> str | None:
    """Returns the kind of a file in words, from its first bytes, or None if unknown."""
    if not data:
        return None
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an MP4 video")
    if data[:4] == b"RIFF":
        names = {b"WEBP": "a WebP image", b"AVI ": "an AVI video", b"WAVE": "a WAV sound"}
        return names.get(data[8:12])
    for beginning, kind in _BEGINNINGS:
        if data.startswith(beginning):
            return kind
    text = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for beginning, kind in _TEXTS if text.startswith(beginning)), None)


def _turned(picture: Image.Image) -> Image.Image:
    """Returns the picture upright, by its Exif data. Unreadable Exif data is ignored."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except (ValueError, TypeError, KeyError, SyntaxError, struct.error):
        return picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = _from_16_bits(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    # Transparent pixels may have any colour. It is often black, as is the text on them.
    shown = picture.convert("RGBA")
    on_white = Image.new("RGB", shown.size, "white")
    on_white.paste(shown, mask=shown.getchannel("A"))
    return on_white


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Converts a grey picture from 16 to 8 bits. Pillow's own conversion clips at 255."""
    values = np.asarray(picture).clip(0, 65535).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    hidden = picture.info.get("transparency")  # this grey value means transparent
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray(((values != hidden) * 255).astype(np.uint8)))
    return grey

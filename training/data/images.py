"""Reads image files whose picture is exactly 8-bit RGB; refuses all others with one line that says why."""

import io
import stat
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from training.errors import Refusal

LARGEST = 1 << 24  # bytes of a file: a small picture with all that cameras and editors write beside it
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # whose values are 8-bit RGB, or lead to it by a table
SRGB = {  # what PNG's chunks gAMA and cHRM say of sRGB
    "gamma": (1 / 2.2,),
    "chromaticity": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
}


def read_rgb(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """Reads a PNG or JPEG file of this size as it is shown: uint8 [height, width, 3], in sRGB.

    What another form of storage says exactly is accepted: grey levels, a palette, an alpha channel that is opaque
    everywhere, a rotation in the EXIF data, a colour profile that changes nothing. What a conversion would change is
    refused: more than 8 bits, transparency, CMYK, other colours, several frames. Nothing is decoded before its size is
    known.

    Raises:
        ValueError: the file is not accepted; the text is one line that says why.
        OSError: the file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {LARGEST:,}")
    content = path.read_bytes()
    _check_png_header(content, width, height)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            _check_size(image.size, width, height)
            image.verify()  # checksums and chunks up to the end
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} frames")
            image.load()
            picture = ImageOps.exif_transpose(_rgb(image))
    except Image.UnidentifiedImageError:
        raise ValueError("it is damaged, or neither PNG nor JPEG") from None
    except Exception as error:  # Pillow raises whatever its parsers, struct and zlib do
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return np.asarray(picture)


def _check_size(found: tuple[int, int], width: int, height: int) -> None:
    if found != (width, height):
        raise ValueError(f"it is {found[0]}x{found[1]}, not {width}x{height}")


def _check_png_header(content: bytes, width: int, height: int) -> None:
    """Refuses 16-bit RGB: Pillow drops its lower half without a word."""
    if content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and len(content) > 24:
        *size, depth = struct.unpack(">IIB", content[16:25])
        _check_size(tuple(size), width, height)
        if depth > 8:
            raise ValueError(f"it has {depth} bits per channel, more than 8")


def _rgb(image: Image.Image) -> Image.Image:
    """The same picture in mode RGB; ValueError where it is not the same."""
    if image.mode not in MODES:
        raise ValueError(f"its colours are {image.mode}, which is not RGB, grey or a palette")
    if image.mode == "P" and np.asarray(image).max() >= len(image.palette.palette) // len(image.palette.mode):
        raise ValueError("it has pixels that its palette does not have")
    opaque = not ("A" in image.mode or "transparency" in image.info)
    if not opaque and np.asarray(image.convert("RGBA"))[:, :, 3].min() < 255:
        raise ValueError("it has transparent pixels")
    if "icc_profile" in image.info:
        _check_profile(image)
    elif "srgb" not in image.info:
        for name, values in SRGB.items():
            found = np.atleast_1d(image.info.get(name, values))
            if found.shape != np.shape(values) or np.abs(found - values).max() > 0.002:
                raise ValueError(f"its colours are not sRGB: it has a {name} of {', '.join(f'{x:g}' for x in found)}")
    return image.convert("RGB") if opaque else image.convert("RGBA").convert("RGB")


def _check_profile(image: Image.Image) -> None:
    """Raises ValueError if the profile's colours are other numbers in sRGB, beyond rounding."""
    grey = image.mode in ("1", "L", "LA")
    values = image.convert("L" if grey else "RGB")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    name = " ".join(ImageCms.getProfileDescription(profile).split())
    try:
        shown = ImageCms.profileToProfile(values, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        raise ValueError(f"its colour profile {name!r} is not one for its channels") from None
    difference = np.asarray(shown, dtype=int) - np.asarray(values.convert("RGB"), dtype=int)
    if np.abs(difference).max() > 1:
        raise ValueError(f"its colours are not sRGB: its profile is {name!r}")


def is_image(path: Path) -> bool:
    """Whether a file in a class folder is to be read; Refusal for an image, or a folder, that would be left out."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or (suffix not in Image.registered_extensions() and not path.is_dir()):
        return False
    if suffix not in (".png", ".jpg", ".jpeg"):
        what = "a folder in a class folder" if path.is_dir() else "an image, but not .png, .jpg or .jpeg"
        raise Refusal(f"argument --dataset-dir: {path} is {what}; move it away, or convert it")
    return True

"""Reads image files that are exactly 8-bit RGB, and refuses all other files with one line that says why."""

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from training.data.dataset import one_line
from training.errors import Refusal
from training.files.json_files import read_file

LARGEST = 1 << 24  # bytes of a file: enough for a small picture with the metadata of cameras and editors
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # 8-bit RGB, grey or a palette
SRGB = {  # the values of PNG's chunks gAMA and cHRM for sRGB
    "gamma": (1 / 2.2,),
    "chromaticity": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
}


def read_rgb(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """Reads a PNG or JPEG file of this size as a viewer shows it: uint8 [height, width, 3], in sRGB.

    It accepts what converts to 8-bit RGB exactly: grey levels, a palette, an opaque alpha channel, a rotation in the
    EXIF data, a colour profile that changes nothing. It refuses what a conversion would change: more than 8 bits,
    transparency, CMYK, other colours, several frames. It decodes nothing before it knows the size.

    Raises:
        ValueError: the file is not accepted; the text is one line that says why.
        OSError: the file cannot be read.
    """
    content = read_file(path, LARGEST)
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
        raise ValueError(one_line(error)) from None
    return np.asarray(picture)


def _check_size(found: tuple[int, int], width: int, height: int) -> None:
    if found != (width, height):
        raise ValueError(f"it is {found[0]}x{found[1]}, not {width}x{height}")


def _check_png_header(content: bytes, width: int, height: int) -> None:
    """Refuses a PNG with more than 8 bits per channel: Pillow silently drops the lower bits."""
    if content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and len(content) > 24:
        *size, depth = struct.unpack(">IIB", content[16:25])
        _check_size(tuple(size), width, height)
        if depth > 8:
            raise ValueError(f"it has {depth} bits per channel, more than 8")


def _rgb(image: Image.Image) -> Image.Image:
    """The same picture in mode RGB; raises ValueError if it would not be the same."""
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
    """Raises ValueError if the conversion from the profile to sRGB changes a colour by more than rounding."""
    grey = image.mode in ("1", "L", "LA")
    values = image.convert("L" if grey else "RGB")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    name = " ".join(ImageCms.getProfileDescription(profile).split())
    try:
        shown = ImageCms.profileToProfile(values, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        raise ValueError(f"its colour profile {name!r} does not fit its channels") from None
    difference = np.asarray(shown, dtype=int) - np.asarray(values.convert("RGB"), dtype=int)
    if np.abs(difference).max() > 1:
        raise ValueError(f"its colours are not sRGB: its profile is {name!r}")


def is_image(path: Path) -> bool:
    """Whether to read a file in a class folder. Raises Refusal for a folder or an unsupported image format."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or (suffix not in Image.registered_extensions() and not path.is_dir()):
        return False
    if suffix not in (".png", ".jpg", ".jpeg"):
        what = "a folder in a class folder" if path.is_dir() else "an image, but not .png, .jpg or .jpeg"
        raise Refusal(f"argument --dataset-dir: {path} is {what}; move it away or convert it")
    return True

"""Image files: what they show is what is read, or they are refused with the reason."""

import contextlib
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from training.data.images import LARGEST, read_rgb

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
INDEX = RNG.integers(0, 5, (32, 32), dtype=np.uint8)
PALETTE = np.arange(15, dtype=np.uint8).reshape(5, 3)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(rows, depth, colour, *extra, size=(32, 32)):
    """A PNG of these rows, by the specification: colour type 0 is grey, 2 RGB, 3 a palette, 6 RGBA."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + np.asarray(row).tobytes() for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def saved(mode="RGB", form="PNG", **settings):
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, form, **settings)
    return file.getvalue()


def decoded(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def turned(form):
    exif = Image.Exif()
    exif[0x112] = 6  # the picture is to be turned clockwise
    return saved(form=form, exif=exif.tobytes())


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[:, :, None], 3, axis=2)


def profile(swap=False):
    """sRGB as an ICC profile; with its red and green exchanged it is another one."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swap:
        content = content.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return content


def read(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    return read_rgb(tmp_path / "image.png", 32, 32)


PACKED = RNG.integers(0, 256, (32, 8), dtype=np.uint8)  # 2 bits per pixel
FOUR = np.stack([(PACKED >> shift) & 3 for shift in (6, 4, 2, 0)], axis=2).reshape(32, 32)
PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    ("content", "picture"),
    [
        pytest.param(saved(), PIXELS, id="RGB"),
        pytest.param(saved(form="JPEG"), decoded(saved(form="JPEG")), id="JPEG"),
        pytest.param(png(GREY, 8, 0), grey(GREY), id="grey"),
        pytest.param(png(PACKED, 2, 0), grey(85 * FOUR), id="four grey levels"),
        pytest.param(png(PACKED[:, :4], 1, 0), grey(255 * np.unpackbits(PACKED[:, :4], axis=1)), id="black and white"),
        pytest.param(png(INDEX, 8, 3, (b"PLTE", PALETTE.tobytes())), PALETTE[INDEX], id="palette"),
        pytest.param(
            png(INDEX, 8, 3, (b"PLTE", PALETTE.tobytes() + bytes(3)), (b"tRNS", b"\xff" * 5 + b"\0")),
            PALETTE[INDEX],
            id="transparent entry that no pixel has",
        ),
        pytest.param(saved("RGBA"), PIXELS, id="opaque RGBA"),
        pytest.param(saved("LA"), decoded(saved("L")), id="opaque grey with alpha"),
        pytest.param(turned("PNG"), np.rot90(PIXELS, -1), id="turned PNG"),
        pytest.param(turned("JPEG"), np.rot90(decoded(saved(form="JPEG")), -1), id="turned JPEG"),
        pytest.param(saved(icc_profile=profile()), PIXELS, id="profile of sRGB"),
        pytest.param(png(PIXELS, 8, 2, (b"gAMA", struct.pack(">I", 45455))), PIXELS, id="gamma of sRGB"),
        pytest.param(png(PIXELS, 8, 2, (b"cHRM", struct.pack(">8I", *PRIMARIES))), PIXELS, id="primaries of sRGB"),
    ],
)
def test_what_is_exactly_8_bit_rgb_is_read_as_it_is_shown(tmp_path, content, picture):
    assert np.array_equal(read(tmp_path, content), picture)


def damaged_length(length):
    content = bytearray(saved())
    content[33:37] = struct.pack(">I", length)  # of IDAT
    return bytes(content)


def jpeg_of_size(side):
    content = saved(form="JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", side, side) + content[place + 4 :]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(png(np.zeros((32, 96), ">u2"), 16, 2), "it has 16 bits per channel, more than 8", id="16-bit RGB"),
        pytest.param(png(np.zeros((32, 32), ">u2"), 16, 0), "it has 16 bits per channel", id="16-bit grey"),
        pytest.param(saved("CMYK", "JPEG"), "its colours are CMYK", id="CMYK"),
        pytest.param(png(np.dstack([PIXELS, GREY]), 8, 6), "it has transparent pixels", id="RGBA"),
        pytest.param(
            png(INDEX, 8, 3, (b"PLTE", PALETTE.tobytes()), (b"tRNS", b"\xff\xfe")),
            "it has transparent pixels",
            id="palette with transparency",
        ),
        pytest.param(
            png(PIXELS, 8, 2, (b"tRNS", PIXELS[3, 4].astype(">u2").tobytes())),
            "it has transparent pixels",
            id="a transparent colour",
        ),
        pytest.param(png(GREY, 8, 0, (b"tRNS", b"\0\5")), "it has transparent pixels", id="a transparent grey"),
        pytest.param(
            png(INDEX, 8, 3, (b"PLTE", PALETTE[:4].tobytes())), "it has pixels that its palette does not", id="palette"
        ),
        pytest.param(saved(save_all=True, append_images=[Image.new("RGB", (32, 32))]), "it has 2 frames", id="APNG"),
        pytest.param(
            saved(form="MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))]), "it has 2 frames", id="MPO"
        ),
        pytest.param(
            saved(icc_profile=profile(swap=True)), "its colours are not sRGB: its profile is 'sRGB", id="profile"
        ),
        pytest.param(saved("L", icc_profile=profile()), "does not fit its channels", id="profile of another mode"),
        pytest.param(saved(icc_profile=b"none" * 40), "cannot open profile", id="profile that is none"),
        pytest.param(
            png(PIXELS, 8, 2, (b"gAMA", struct.pack(">I", 100_000))), "not sRGB: it has a gamma of 1", id="linear"
        ),
        pytest.param(
            png(PIXELS, 8, 2, (b"cHRM", struct.pack(">8I", *PRIMARIES[:2], 68000, 32000, *PRIMARIES[4:]))),
            "not sRGB: it has a chromaticity of 0.3127, 0.329, 0.68",
            id="other primaries",
        ),
        pytest.param(png([], 8, 2, size=(20_000, 20_000)), "it is 20000x20000, not 32x32", id="large PNG"),
        pytest.param(jpeg_of_size(20_000), "Image size (400000000 pixels) exceeds limit", id="large JPEG"),
        pytest.param(jpeg_of_size(33), "it is 33x33, not 32x32", id="JPEG of another size"),
        pytest.param(damaged_length(2**31 - 1), "Truncated File Read", id="a length of 2 GB"),
        pytest.param(damaged_length(5), "broken PNG file", id="a length that is too short"),
        pytest.param(
            png(PIXELS, 8, 2, (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 24)))), "MAX_TEXT_CHUNK", id="packed text"
        ),
        pytest.param(png(PIXELS, 8, 2, (b"tEXt", b"k\0" + b"x" * LARGEST)), "bytes, more than 16,777,216", id="text"),
        pytest.param(saved()[:1500], "Truncated", id="PNG cut short"),
        pytest.param(saved()[:-12], "truncated PNG file", id="PNG without its end"),
        pytest.param(saved(form="JPEG")[:-300], "image file is truncated", id="JPEG cut short"),
        *(
            pytest.param(content, "it is damaged, or neither PNG nor JPEG", id=name)
            for name, content in (("GIF", saved(form="GIF")), ("HTML", b"<html>"), ("nothing", b""))
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_the_rest_is_refused_with_the_reason(tmp_path, content, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_rgb(tmp_path / "image.png", 32, 32)


@given(
    base=st.sampled_from([saved(), saved("P"), turned("PNG")]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3),
    cut=st.none() | st.integers(0, 3000),
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_a_damaged_png_is_refused_or_the_same_picture(tmp_path_factory, base, changes, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.png"
    path.write_bytes(base)
    picture = read_rgb(path, 32, 32)
    content = bytearray(base)
    for place, value in changes:
        content[place % len(content)] ^= value
    path.write_bytes(content[:cut])
    with contextlib.suppress(ValueError):
        assert np.array_equal(read_rgb(path, 32, 32), picture)

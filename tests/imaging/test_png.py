"""PNG files: metadata that are damaged or too large, and chunks about color."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import SRGB, file_of, random_image
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from imaging.formats import FORMATS
from imaging.images import read_image, write_image
from imaging.png import read_cicp, tolerant_png
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user
LARGE = zlib.compress(bytes(2**20 + 1))  # one byte above Pillow's limit


def chunk(cid, content):
    return struct.pack(">I", len(content)) + cid + content + struct.pack(">I", zlib.crc32(cid + content))


def write_png(name, *chunks, at_end=False):
    """Write a PNG file with these chunks before or after the pixels."""
    file = file_of(random_image(), "PNG")
    place = len(file) - 12 if at_end else 33
    Path(name).write_bytes(file[:place] + b"".join(chunks) + file[place:])


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("cid", "content"),
    [
        (b"zTXt", b"workflow\0\0" + LARGE),
        (b"zTXt", b"workflow\0\1damaged"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
        (b"iCCP", b"ICC Profile\0\0" + LARGE),
        (b"iCCP", b"ICC Profile"),
        (b"gAMA", b"\0\0"),
        (b"cHRM", bytes(30)),
        (b"sRGB", b""),
        (b"pHYs", b"\0"),
    ],
)
def test_metadata_that_pillow_refuses_do_not_cost_the_image(cid, content, at_end, capfd):
    write_png("a.png", chunk(cid, content), at_end=at_end)
    assert np.array_equal(read_image(Path("a.png")), random_image())
    warning = f"WARNING: a.png: metadata that are damaged or too large are ignored ({cid.decode()})\n"
    assert capfd.readouterr().err == warning
    assert PngImagePlugin.PngStream.__module__ == "PIL.PngImagePlugin"  # as before


def test_other_metadata_are_kept(capfd):
    profile = chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(SRGB))
    write_png("a.png", chunk(b"zTXt", b"a\0\0" + LARGE), profile, chunk(b"zTXt", b"b\0\0" + LARGE))
    assert read_image(Path("a.png")).info == {"icc_profile": SRGB}
    assert capfd.readouterr().err.count("\n") == 1


def test_text_is_not_decompressed_beyond_the_limit():
    write_png("a.png", chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(2**25), 1)))
    tracemalloc.start()
    try:
        read_image(Path("a.png"))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_sum_of_texts_is_limited(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2500)
    texts = [chunk(b"zTXt", b"%d\0\0" % number + zlib.compress(bytes(1000))) for number in range(100)]
    write_png("a.png", *texts, chunk(b"gAMA", struct.pack(">I", 45455)))
    with tolerant_png() as ignored, Image.open("a.png") as file:
        assert len(file.text) == 3
        assert file.info["gamma"] == 0.45455
    assert ignored == {"zTXt"}


@pytest.mark.parametrize(("cid", "content"), [(b"IHDR", b"short"), (b"tRNS", b"\0"), (b"IDAT", b"damaged")])
def test_chunks_that_pixels_need_are_not_ignored(cid, content):
    write_png("a.png", chunk(cid, content))
    with pytest.raises(CommandError, match=r"^a\.png: not an image that can be read"):
        read_image(Path("a.png"))


# ------------------------------------------------------------------------------------ colors


def copied(output, mode, pnginfo):
    """Write a PNG file with these chunks, read it, and write it again."""
    random_image(mode).save("c.png", pnginfo=pnginfo)
    image = read_image(Path("c.png"))
    write_image(image, Path(output), image.info)


def chunks(**contents):
    info = PngInfo()
    for name, content in contents.items():
        info.add(name.encode(), content)
    return info


GAMMA_1 = {"gAMA": struct.pack(">I", 100000)}
P3_PRIMARIES = {"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)}
P3_CICP, PQ = {"cICP": bytes([12, 13, 0, 1])}, {"cICP": bytes([9, 16, 0, 1])}
STANDARD = {
    "gAMA": struct.pack(">I", 45455),
    "cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
}
SRGB_CHUNK = {"sRGB": b"\0", **STANDARD}


def chunks_in(path):
    content, position, found = Path(path).read_bytes(), 8, {}
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        name = content[position + 4 : position + 8].decode()
        found[name] = content[position + 8 : position + 8 + length]
        position += 12 + length
    return found


@pytest.mark.parametrize("contents", [GAMMA_1, P3_PRIMARIES, P3_CICP, PQ, SRGB_CHUNK, {**PQ, **P3_PRIMARIES}], ids=list)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_png_keeps_chunks_about_color(contents, mode, capfd):
    copied("copy.png", mode, chunks(**contents))
    found = chunks_in("copy.png")
    assert {name: found.get(name) for name in contents} == contents
    assert list(found).index("IDAT") > max(list(found).index(name) for name in contents)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("contents", "names"),
    [
        (GAMMA_1, "gAMA"),
        (P3_PRIMARIES, "cHRM"),
        (P3_CICP, "cICP"),
        ({**PQ, **SRGB_CHUNK}, "gAMA, cHRM, sRGB, cICP"),
        (STANDARD, ""),
        (SRGB_CHUNK, ""),
        ({"cICP": bytes([1, 13, 0, 1]), **GAMMA_1}, ""),
        ({"sRGB": b"\0", **GAMMA_1}, ""),
    ],
)
def test_other_format_warns_once_that_colors_will_differ(contents, names, capfd):
    for format in {*FORMATS} - {"PNG"}:
        output = f"o.{format.lower()}"
        copied(output, "RGB", chunks(**contents))
        warning = f"WARNING: {output}: colors will look different, since {format} does not support PNG's {names}\n"
        assert capfd.readouterr().err == (warning if names else "")


def test_search_for_cicp_does_not_move_the_file():
    write_png("a.png", chunk(b"cICP", bytes([9, 16, 0, 1])))
    with Image.open("a.png") as file:
        file.fp.seek(20)
        read_cicp(file)
        assert (file.fp.tell(), file.info) == (20, {"cicp": bytes([9, 16, 0, 1])})

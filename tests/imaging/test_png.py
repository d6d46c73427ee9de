"""PNG files: metadata that is damaged or too large, and chunks about color."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import SRGB, file_of, random_image
from PIL import Image, PngImagePlugin, features
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
def test_image_is_read_despite_metadata_that_pillow_refuses(cid, content, at_end, capfd):
    write_png("a.png", chunk(cid, content), at_end=at_end)
    assert np.array_equal(read_image(Path("a.png")), random_image())
    warning = f"WARNING: a.png: metadata that is damaged or too large is ignored ({cid.decode()})\n"
    assert capfd.readouterr().err == warning
    assert PngImagePlugin.PngStream.__module__ == "PIL.PngImagePlugin"  # as before


INTACT = {
    b"tEXt": b"Comment\0text",
    b"zTXt": b"Comment\0\0" + zlib.compress(b"text"),
    b"iTXt": b'XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation="6"/>',
    b"iCCP": b"ICC Profile\0\0" + zlib.compress(SRGB),
    b"gAMA": struct.pack(">I", 100000),
    b"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    b"sRGB": b"\0",
    b"cICP": bytes([9, 16, 0, 1]),
    b"pHYs": struct.pack(">IIB", 11811, 11811, 1),
    b"eXIf": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x112, 3, 1, 6) + bytes(4),
    b"bKGD": bytes(6),
    b"tIME": bytes(7),
}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("cid", INTACT)
def test_metadata_with_a_wrong_checksum_are_ignored(cid, at_end, capfd):
    damaged = bytearray(chunk(cid, INTACT[cid]))
    damaged[-1] ^= 1
    write_png("a.png", damaged, at_end=at_end)
    image = read_image(Path("a.png"))
    assert np.array_equal(image, random_image())
    assert image.info == {}
    warning = f"WARNING: a.png: metadata that is damaged or too large is ignored ({cid.decode()})\n"
    assert capfd.readouterr().err == warning


@pytest.mark.parametrize("cid", [b"IDAT", b"PLTE", b"tRNS"])
def test_chunk_that_pixels_need_is_refused_with_a_wrong_checksum(cid):
    damaged = bytearray(chunk(cid, bytes(6)))
    damaged[-1] ^= 1
    write_png("a.png", damaged)
    with pytest.raises(CommandError, match=r"^a\.png: not an image that can be read"):
        read_image(Path("a.png"))


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


KEYWORDS = ["aspect", "background", "bbox", "blend", "chromaticity", "cicp", "default_image", "disposal", "dpi"]
KEYWORDS += ["duration", "exif", "gamma", "icc_profile", "interlace", "loop", "pnginfo", "srgb", "transparency", "xmp"]


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
@pytest.mark.parametrize("at_end", [False, True])
def test_text_whose_keyword_is_a_key_of_pillow_changes_nothing(kind, at_end, capfd):
    kept = [chunk(cid, INTACT[cid]) for cid in (b"cICP", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"eXIf")]
    write_png("a.png", *kept)
    expected = read_image(Path("a.png"))
    between = {"tEXt": "\0", "zTXt": "\0\0", "iTXt": "\0\0\0\0\0"}[kind]
    text = zlib.compress(b"10 10 20 20") if kind == "zTXt" else b"10 10 20 20"
    texts = [chunk(kind.encode(), (keyword + between).encode() + text) for keyword in KEYWORDS]
    content = Path("a.png").read_bytes()
    place = len(content) - 12 if at_end else content.index(b"IDAT") - 4
    Path("b.png").write_bytes(content[:place] + b"".join(texts) + content[place:])
    image = read_image(Path("b.png"))
    assert np.array_equal(image, expected)
    assert image.size == (15, 24)
    assert {*image.info} == {"icc_profile", "exif", "dpi", "pnginfo"}
    assert image.info.pop("pnginfo").chunks == expected.info.pop("pnginfo").chunks
    assert image.info == expected.info
    assert capfd.readouterr().err == ""


def test_texts_can_still_be_read():
    write_png("a.png", chunk(b"tEXt", b"bbox\0text"))
    with tolerant_png(), Image.open("a.png") as file:
        assert file.text == {"bbox": "text"}
        assert file.info == {}


@pytest.mark.parametrize("text", [b'<tiff:Orientation="6"/>', b'<tiff:Orientation="6"/>\xe9'], ids=["UTF-8", "Latin-1"])
def test_orientation_in_xmp_is_read(text):
    write_png("a.png", chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text), chunk(b"tEXt", b"xmp\0text"))
    assert read_image(Path("a.png")).size == (15, 24)


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


ZERO_Y = {"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 0)}
ZERO_X = {"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 0, 6000)}


@pytest.mark.parametrize(
    "contents",
    [
        {"gAMA": bytes(4)},
        {"cHRM": bytes(32)},
        ZERO_Y,
        *({"cICP": bytes([9, 16, 0, 1, 0])[:length]} for length in (0, 1, 3, 5)),
        {"cICP": PQ["cICP"] + struct.pack(">I", zlib.crc32(b"cICP" + PQ["cICP"]))},
    ],
    ids=str,
)
def test_chunks_that_viewers_ignore_are_dropped(contents, capfd):
    for output in ("o.png", "o.jpg"):
        copied(output, "RGB", chunks(**contents))
        assert capfd.readouterr().err == ""
    assert not {*contents} & {*chunks_in("o.png")}


@pytest.mark.parametrize(
    ("contents", "names"),
    [
        (ZERO_X, "cHRM"),
        ({**GAMMA_1, **ZERO_Y}, "gAMA"),
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


@pytest.mark.parametrize(
    ("primaries", "transfer", "kept"),
    [(9, 16, [9, 16, 0, 1]), (12, 13, [12, 13, 0, 1]), (1, 13, None), (2, 2, None), (1, 1, None)],
)
@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not support AVIF")
def test_colors_of_avif_become_cicp(primaries, transfer, kept, capfd):
    """In the file, colrnclx is followed by primaries, transfer function, matrix and range."""
    content = file_of(random_image(), "AVIF")
    start = content.index(b"colrnclx") + 8
    content = content[:start] + struct.pack(">2H", primaries, transfer) + content[start + 4 :]
    Path("a.avif").write_bytes(content)
    image = read_image(Path("a.avif"))
    chunks = image.info["pnginfo"].chunks if "pnginfo" in image.info else []
    assert [(cid, [*value]) for cid, value, *_ in chunks] == ([(b"cICP", kept)] if kept else [])
    write_image(image, Path("a.jpg"), image.info)
    warning = "WARNING: a.jpg: colors will look different, since JPEG does not support PNG's cICP\n"
    assert capfd.readouterr().err == (warning if kept else "")

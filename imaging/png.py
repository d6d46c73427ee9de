"""PNG: metadata that Pillow would refuse, and chunks about color."""

import contextlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import IO, Any

from PIL import Image, ImageFile, PngImagePlugin
from PIL.PngImagePlugin import PngInfo, PngStream

TEXT = (b"tEXt", b"zTXt", b"iTXt")
COLOR = (b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
METADATA = (*TEXT, *COLOR, b"pHYs", b"eXIf", b"bKGD", b"hIST", b"sBIT", b"sPLT", b"tIME")
ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of the texts that can contain it
# What sRGB would be: primaries, transfer function, matrix and range; gamma; white, red, green and blue as x and y.
SRGB_CICP = bytes([1, 13, 0, 1])
# Primaries and transfer functions that AVIF viewers show as sRGB: sRGB's, BT.709's, BT.601's, unspecified or missing.
AVIF_SRGB = set(product((0, 1, 2), (0, 1, 2, 6, 13)))
SRGB_GAMA = struct.pack(">I", 45455)
SRGB_CHRM = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


class TolerantPngStream(PngStream):
    """Pillow's reader of chunks, but metadata that it would refuse the whole file for are added to ``ignored``."""

    def __init__(self, ignored: set[str], fp: IO[bytes]) -> None:
        super().__init__(fp)
        self.ignored = ignored

    def call(self, cid: bytes, pos: int, length: int) -> bytes:
        if cid not in METADATA:
            return super().call(cid, pos, length)
        assert self.fp
        content = ImageFile._safe_read(self.fp, length)
        intact = is_intact(cid, content, self.fp.read(4))
        if intact and (cid not in TEXT or self.text_memory <= PngImagePlugin.MAX_TEXT_MEMORY):
            self.fp.seek(pos)
            with contextlib.suppress(ValueError, SyntaxError, IndexError, struct.error), self.hide_text(cid, content):
                return super().call(cid, pos, length)
        self.ignored.add(cid.decode())
        self.fp.seek(pos + length)
        return content

    @contextlib.contextmanager
    def hide_text(self, cid: bytes, content: bytes) -> Iterator[None]:
        """Keep a text out of the image's info, where its keyword could mean something else."""
        info = self.im_info
        if cid in TEXT and content.split(b"\0")[0] not in ORIENTATION:
            self.im_info = {}
        try:
            yield
        finally:
            self.im_info = info

    def crc(self, cid: bytes, data: bytes) -> None:
        if cid in METADATA:  # call() has checked it
            self.crc_skip(cid, data)
        else:
            super().crc(cid, data)


def is_intact(cid: bytes, content: bytes, checksum: bytes) -> bool:
    """Return whether a chunk's checksum, of 4 bytes, is right."""
    return zlib.crc32(content, zlib.crc32(cid)).to_bytes(4, "big") == checksum


@contextlib.contextmanager
def tolerant_png() -> Iterator[set[str]]:
    """Let Pillow read PNG files with damaged or too large metadata, and yield the names of the chunks it ignores.

    This is a setting of Pillow, so it also affects other threads.
    """
    ignored: set[str] = set()
    stream = PngImagePlugin.PngStream
    PngImagePlugin.PngStream = partial(TolerantPngStream, ignored)  # type: ignore[misc, assignment]
    try:
        yield ignored
    finally:
        PngImagePlugin.PngStream = stream  # type: ignore[misc]


def read_cicp(file: Image.Image) -> None:
    """Add the chunk cICP of a PNG, or what says the same in an AVIF, to the info, since Pillow ignores both.

    The image must not be loaded yet.
    """
    source = getattr(file, "fp", None)
    if source and file.format in ("PNG", "AVIF"):
        position = source.tell()
        content = png_cicp(source) if file.format == "PNG" else avif_cicp(source)
        if content and (file.format == "PNG" or "icc_profile" not in file.info):  # AVIF prefers the profile
            file.info["cicp"] = content
        source.seek(position)


def png_cicp(source: IO[bytes]) -> bytes:
    """Return the content of a PNG's chunk cICP, or nothing if it is missing or damaged."""
    source.seek(8)
    while len(header := source.read(8)) == 8 and header[4:] not in (b"IDAT", b"IEND"):
        start, length = source.tell(), int.from_bytes(header[:4], "big")
        if header[4:] == b"cICP" and length == 4 and is_intact(b"cICP", content := source.read(4), source.read(4)):
            return content
        source.seek(start + length + 4)
    return b""


def avif_cicp(source: IO[bytes]) -> bytes:
    """Return the chunk cICP for the RGB that an AVIF decodes to, or nothing if its colors are those of sRGB."""
    source.seek(0)
    values = source.read().partition(b"colrnclx")[2][:4]
    primaries, transfer = int.from_bytes(values[:2], "big"), int.from_bytes(values[2:], "big")
    unusual = (primaries, transfer) not in AVIF_SRGB and max(primaries, transfer) < 256
    return bytes([primaries, transfer, 0, 1]) if unusual else b""


def color_chunks(info: Mapping[Any, Any]) -> PngInfo | None:
    """Return the chunks about color that Pillow's info of an image describes, or None if there are none."""
    if isinstance(info.get("pnginfo"), PngInfo):  # the image was upscaled before
        return info["pnginfo"]
    chunks = PngInfo()
    for cid, key, encode in (
        (b"gAMA", "gamma", lambda gamma: struct.pack(">I", round(1e5 * gamma))),
        (b"cHRM", "chromaticity", lambda values: struct.pack(">8I", *(round(1e5 * value) for value in values))),
        (b"sRGB", "srgb", lambda intent: bytes([intent])),
        (b"cICP", "cicp", lambda content: struct.pack("4B", *content)),
    ):
        with contextlib.suppress(Exception):  # the value can be of any type, since texts are also in the info
            if is_usable(cid, content := encode(info[key])):
                chunks.add(cid, content)
    return chunks if chunks.chunks else None


def is_usable(cid: bytes, content: bytes) -> bool:
    """Return whether viewers use a chunk about color. They ignore a gamma of 0, and chromaticities if a y is 0."""
    if cid == b"gAMA":
        return any(content)
    return cid != b"cHRM" or all(struct.unpack(">8I", content)[1::2])


def overrides_profile(info: PngInfo) -> bool:
    """Return whether viewers use a chunk about color rather than an ICC profile. They do so with cICP alone."""
    return any(cid == b"cICP" for cid, *_ in info.chunks)


def describes_srgb(info: PngInfo) -> bool:
    """Return whether the chunks about color say what viewers assume without them."""
    chunks = {chunk[0]: chunk[1] for chunk in info.chunks}
    if b"cICP" in chunks:
        return chunks[b"cICP"] == SRGB_CICP
    if b"sRGB" in chunks:
        return True
    gamma, *point = struct.unpack(">9I", chunks.get(b"gAMA", SRGB_GAMA) + chunks.get(b"cHRM", SRGB_CHRM))
    standard_gamma, *standard_point = struct.unpack(">9I", SRGB_GAMA + SRGB_CHRM)
    close = all(abs(a - b) < 500 for a, b in zip(point, standard_point, strict=True))
    return close and abs(gamma - standard_gamma) < 2273  # 5%, as in libpng

"""EXIF data: a few values are read and changed, and all other bytes stay as and where they are.

Pillow would write the data anew. That replaces accents in text, and moves what maker notes refer to by its position.
"""

import struct

from PIL.ExifTags import IFD, Base

PREFIX = b"Exif\0\0"
SHORT, LONG, RATIONAL = 3, 4, 5  # types
WIDTHS, HEIGHTS = (Base.ImageWidth, Base.ExifImageWidth), (Base.ImageLength, Base.ExifImageHeight)
RESOLUTION = (Base.XResolution, Base.YResolution)
NO_UNIT, INCH, CENTIMETER = 1, 2, 3  # units of resolution
Rational = tuple[int, int, int]  # position, numerator and denominator


class ExifData:
    """EXIF data, which is a TIFF file without an image. Raise ValueError if it has no directory of tags."""

    def __init__(self, content: bytes) -> None:
        content = content.removeprefix(PREFIX).removeprefix(PREFIX)  # some programs write it twice
        if content[:4] not in (b"II*\0", b"MM\0*"):
            raise ValueError("no TIFF header")
        self.content = bytearray(content)
        self.order = "<" if content.startswith(b"I") else ">"
        self.structure = [range(8)]  # positions of the header and the directories, where no value can be
        self.main = self.read_entries(self.read("I", 4))
        if not self.main:
            raise ValueError("no tags")
        pointers = [self.read("I", position + 8) for tag, position in self.main if tag == IFD.Exif]
        self.entries = self.main + [entry for pointer in pointers[:1] for entry in self.read_entries(pointer)]

    def read(self, format: str, position: int) -> int:
        """Read a number: H is of 16 bits, and I of 32. Beyond the end all numbers are 0."""
        size = struct.calcsize(format)
        return int(struct.unpack(self.order + format, self.content[position : position + size].ljust(size, b"\0"))[0])

    def write(self, format: str, position: int, *values: int) -> None:
        struct.pack_into(self.order + format, self.content, position, *values)

    def read_entries(self, start: int) -> list[tuple[int, int]]:
        """Return the tags of a directory, and the positions of their entries of 12 bytes: tag, type, count, value.

        Return an empty list if the directory would overlap the header or one that was read before.
        """
        end = min(start + 2 + 12 * self.read("H", start), len(self.content))
        if not self.is_free(start, end + 4):  # the position of the next directory follows
            return []
        self.structure.append(range(start, end + 4))
        return [(self.read("H", position), position) for position in range(start + 2, end - 11, 12)]

    def is_free(self, start: int, end: int) -> bool:
        """Return whether these positions overlap neither the header nor a directory that has been read."""
        return all(end <= part.start or part.stop <= start for part in self.structure)

    def read_rational(self, tag: int) -> Rational | None:
        """Return a number, or None if it is missing or would overlap the header or a directory."""
        for position in (self.read("I", entry + 8) for entry in self.find(tag, RATIONAL)):
            if position + 8 <= len(self.content) and self.is_free(position, position + 8):
                return position, self.read("I", position), self.read("I", position + 4)
        return None

    def read_resolution(self) -> tuple[Rational | None, Rational | None]:
        """Return the resolutions in x and y, or None if missing or damaged."""
        x, y = (self.read_rational(tag) for tag in RESOLUTION)
        overlap = x and y and 0 < abs(x[0] - y[0]) < 8
        return (None, None) if overlap else (x, y)

    def find(self, tag: int, kind: int) -> list[int]:
        """Return the positions of the entries of this tag and type in the main directory."""
        return [entry for found, entry in self.main if found == tag and self.read("H", entry + 2) == kind]

    @property
    def unit(self) -> int:
        return next((self.read("H", entry + 8) for entry in self.find(Base.ResolutionUnit, SHORT)), INCH)

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Resolutions in x and y, or None if they are missing, invalid or without a unit."""
        x, y = self.read_resolution()
        inch = {INCH: 1.0, CENTIMETER: 2.54}.get(self.unit)
        if not (x and y and x[2] and y[2] and inch):
            return None
        return inch * x[1] / x[2], inch * y[1] / y[2]


def edit_exif(content: bytes, size: tuple[int, int], scale: int = 1, orientation: int = 1) -> bytes:
    """Return EXIF data for an image that has been turned upright and enlarged. Raise ValueError if they are damaged.

    Neither the length nor the positions of tags change, so that the result can be edited again. A thumbnail is kept,
    unless the image has been turned.

    Parameters
    ----------
    content : EXIF data of the image before
    size : width and height of the image now
    scale : factor of the resolution
    orientation : EXIF orientation before
    """
    data, (width, height) = ExifData(content), size
    edit_resolution(data, scale if data.unit != NO_UNIT else 1, orientation >= 5)
    for tag, entry in data.entries:
        if tag in WIDTHS or tag in HEIGHTS:
            value = width if tag in WIDTHS else height
            short = data.read("H", entry + 2) == SHORT and value < 2**16
            data.write("HIH" if short else "HII", entry + 2, SHORT if short else LONG, 1, value)
        elif tag == Base.Orientation:
            data.write("HIH", entry + 2, SHORT, 1, 1)
    following = data.main[-1][1] + 12  # position of the thumbnail's directory
    if orientation != 1 and following + 4 <= len(data.content):
        data.write("I", following, 0)
    return PREFIX + bytes(data.content)


def edit_resolution(data: ExifData, scale: int, swap: bool) -> None:
    """Multiply the resolutions by ``scale``, and swap them if the image's sides have been swapped."""
    found = [rational for rational in data.read_resolution() if rational]
    values = [multiply(numerator, denominator, scale) for _, numerator, denominator in found]
    for (position, *_), value in zip(found, reversed(values) if swap else values, strict=True):
        data.write("II", position, *value)


def multiply(numerator: int, denominator: int, scale: int) -> tuple[int, int]:
    """Multiply a rational number. If the numerator would exceed 32 bits, the denominator is divided instead."""
    if not denominator or scale == 1:
        return numerator, denominator
    if scale * numerator < 2**32:
        return scale * numerator, denominator
    return numerator, max(1, round(denominator / scale))

"""Files that are damaged, too large, or not images."""

import contextlib
import errno
import os
import re
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import MORE, SRGB, file_of, in_new_process, peak_memory_mib, random_image
from PIL import BmpImagePlugin, Image
from PIL.ExifTags import Base

from imaging.images import check_output, read_image, write_image
from imaging.tiff import tag_entries
from utils import CommandError

pytestmark = pytest.mark.filterwarnings("error")  # Pillow's warnings must not reach the user


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("missing.bmp", None, "no such file"),
        ("text.bmp", lambda path: path.write_text("not an image"), "not an image that can be read"),
        ("cut.png", lambda path: path.write_bytes(file_of(random_image(), "PNG")[:500]), "not an image .*truncated.*"),
        ("a.eps", lambda path: path.write_bytes(file_of(random_image(), "EPS")), "not an image that can be read"),
        ("f.pfm", lambda path: Image.new("F", (9, 9)).save(path), "not an image .*32 bits, whose range is unknown.*"),
        ("loop.png", lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        ("pipe.png", os.mkfifo, "not a file"),
        ("folder.png", Path.mkdir, "not a file"),
    ],
)
def test_unreadable_file_is_refused_with_its_name(name, make, reason):
    if make:
        make(Path(name))
    with pytest.raises(CommandError) as refusal:
        read_image(Path(name))
    assert re.fullmatch(f"{name}: {reason}", str(refusal.value))


def test_image_larger_than_max_pixels_is_refused():
    random_image(size=(30, 30)).save("a.png")
    assert read_image(Path("a.png"), max_pixels=900).size == (30, 30)
    for limit in (899, 449):  # Pillow refuses only images of more than twice the limit
        with pytest.raises(CommandError, match=rf"^a\.png: more than {limit} pixels; .*--max-pixels"):
            read_image(Path("a.png"), max_pixels=limit)


def test_image_inside_a_file_is_also_limited():
    """An icon whose directory announces 16x16 pixels, but whose PNG has 64x64."""
    png = file_of(random_image(size=(64, 64)), "PNG")
    Path("a.icns").write_bytes(b"icns" + struct.pack(">I4sI", len(png) + 16, b"icp4", len(png) + 8) + png)
    with pytest.raises(CommandError, match=r"^a\.icns: more than 2,000 pixels; .*--max-pixels"):
        read_image(Path("a.icns"), max_pixels=2000)


ZEROS = zlib.compress(bytes(10**6))


def tiff(*tags, content=ZEROS):
    """Return a TIFF of 10x10 gray pixels, compressed by zlib.

    A tag is (number, value), or (number, value, type) if its type is not LONG; the value None is the content's place.
    """
    tags = sorted([(256, 10), (257, 10), (258, 8), (259, 8), (262, 1), *tags], key=lambda tag: tag[0])
    start = 14 + 12 * len(tags)
    entries = [
        struct.pack("<HHII", tag, *kind or [4], 1, start if value is None else value) for tag, value, *kind in tags
    ]
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4) + content


def bombs():
    """Yield small files that Pillow needs much memory for, although they announce few pixels."""
    tiles = (322, 46000), (323, 46000)
    yield tiff(*tiles, (324, None))
    yield tiff(*tiles, (278, 10), (273, None))  # tiles and strips
    yield tiff(*tiles, (322, 16), (323, 16), (324, None))  # Pillow may read the last of each tag, and libtiff the first
    tiles = (322, None, 17), (323, None, 17)  # a type that Pillow does not know: 64 bits, signed
    yield tiff(*tiles, (278, 10), (273, None), content=struct.pack("<q", 46000) + ZEROS)
    png = file_of(Image.new("L", (12000, 12000)), "PNG")
    yield struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png  # an icon
    webp = file_of(random_image(), "WEBP", save_all=True, append_images=[random_image(seed=1)])
    yield webp[:24] + b"\xfe\x3f\0" * 2 + webp[30:]  # 16383x16383
    gif = file_of(random_image("P"), "GIF")
    frame = gif.index(b",\0\0\0\0") + 5
    yield gif[:frame] + b"\xff\xff" * 2 + gif[frame + 4 :]


def peak_of_reading(paths):
    """Return by how many MiB the peak memory grows while files are read that must be refused."""
    before = peak_memory_mib()
    for path in paths:
        with pytest.raises(CommandError, match=r"more than 100,000 pixels|its tag Tile(Width|Length) occurs twice"):
            read_image(path, max_pixels=100_000)
    return peak_memory_mib() - before


def test_memory_is_bounded_by_max_pixels():
    paths = []
    for number, content in enumerate(bombs()):
        paths.append(Path(f"bomb{number}").absolute())
        paths[-1].write_bytes(content)
    assert in_new_process(peak_of_reading, paths) < 30


@pytest.mark.parametrize(("values", "big"), [("<u2", False), ("<u2", True), (">u2", False)])
def test_tiff_tags_are_the_ones_that_pillow_reads(values, big):
    Image.fromarray(np.asarray(random_image("I;16")).astype(values)).save("a.tif", big_tiff=big, software="Pillow test")
    with Image.open("a.tif") as image:
        entries = tag_entries(image.fp)
        assert {tag: kind for tag, kind, _ in entries} == image.tag_v2.tagtype
        assert len(entries) == len(image.tag_v2) > 8
        assert next(count for tag, _, count in entries if tag == Base.Software) == len("Pillow test") + 1


def test_tiled_tiff_is_read():
    content = zlib.compress(bytes(range(256)))
    Path("a.tif").write_bytes(tiff((322, 16), (323, 16), (324, None), (325, len(content)), content=content))
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)[:10, :10]
    assert np.array_equal(read_image(Path("a.tif")), expected)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_file_that_cannot_be_read_is_not_called_damaged(code, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    random_image().save("a.png")
    monkeypatch.setattr(os, "open", fail)  # root may read any file
    with pytest.raises(CommandError, match=f"^a.png: cannot be read: {os.strerror(code)}$"):
        read_image(Path("a.png"))


@pytest.mark.parametrize("when", ["_open", "load"])
def test_memory_error_without_lack_of_memory_is_called_damage(when, monkeypatch):
    """Pillow raises it for sizes that make no sense."""

    def fail(*arguments):
        raise MemoryError

    random_image().save("a.bmp")
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, when, fail)
    with pytest.raises(CommandError, match=r"^a\.bmp: not an image that can be read$"):
        read_image(Path("a.bmp"))


def test_icon_whose_size_makes_no_sense_is_refused():
    content = file_of(random_image("RGBA", (32, 32)), "ICO", bitmap_format="bmp", sizes=[(32, 32)])
    for width, height in ((32, -(2**31)), (2**31 - 1, 64), (-2, 64), (32, 2**31 - 1)):
        Path("a.ico").write_bytes(content[:26] + struct.pack("<ii", width, height) + content[34:])
        with pytest.raises(CommandError, match=r"^a\.ico: "):
            read_image(Path("a.ico"))


def errors_without_memory(paths):
    """Read files with 8 MiB of memory; return the types of the errors."""
    resource, errors = pytest.importorskip("resource"), []
    Image.init()
    for path in paths:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, before[1]))
        try:
            read_image(path)
            errors.append("none")
        except Exception as error:
            errors.append("MemoryError" if isinstance(error, MemoryError) else repr(error))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return errors


def test_lack_of_memory_is_not_called_damage():
    """Decoders report it in many ways: "could not create decoder object", "broken data stream"."""
    paths = []
    for name in ("a.png", "a.jpg", "a.webp", "a.jp2", "a.tif", "a.gif"):
        paths.append(Path(name).absolute())
        Image.new("RGB", (3000, 3000), "red").save(paths[-1])
    assert in_new_process(errors_without_memory, paths) == ["MemoryError"] * len(paths)


def read_damaged(paths):
    for path in paths:
        with contextlib.suppress(CommandError):
            read_image(path)
    os.write(2, b"end")


def test_libraries_print_nothing(capfd):
    """In a new process, since pytest would catch what Pillow logs."""
    paths = []
    for number, compression in enumerate(["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"]):
        paths.append(Path(f"{number}.tif").absolute())
        content = file_of(random_image(size=(50, 50)), "TIFF", compression=compression)
        paths[-1].write_bytes(content[:1000] + b"\x55" * 500 + content[1500:])
    paths.append(Path("samples.tif").absolute())
    paths[-1].write_bytes(tiff((277, 140), (273, None)))
    in_new_process(read_damaged, paths)
    assert capfd.readouterr().err == "end"


def read_without_stderr(path):
    os.close(2)
    sys.__stderr__ = None
    return read_image(path).size


def test_tiff_is_read_while_stderr_is_closed():
    """The file gets descriptor 2."""
    random_image().save("a.tif", compression="tiff_lzw")
    assert in_new_process(read_without_stderr, Path("a.tif").absolute()) == (24, 15)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_file_that_becomes_a_pipe_does_not_block(monkeypatch):
    os.mkfifo("a.png")
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    before = signal.signal(signal.SIGALRM, lambda *arguments: pytest.fail("blocked"))
    signal.alarm(5)
    try:
        with pytest.raises(CommandError, match=r"^a\.png: "):
            read_image(Path("a.png"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sample(extension):
    """Return a small valid file, as bytes."""
    image, exif = random_image(size=(12, 10)).resize((24, 20)), Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = 6, "a camera"
    options = {
        "png": {"exif": exif, "icc_profile": SRGB, "dpi": (72, 72)},
        "jpg": {"exif": exif, "icc_profile": SRGB, "dpi": (72, 72)},
        "webp": {"exif": exif, "icc_profile": SRGB},
        "tif": {"compression": "tiff_lzw", "dpi": (72, 72)},
        "gif": {"save_all": True, "append_images": [image.rotate(90)]},
    }
    return file_of(image, Image.registered_extensions()[f".{extension}"], **options.get(extension, {}))


@pytest.mark.parametrize("extension", ["bmp", "png", "jpg", "webp", "tif", "gif", "ppm"])
def test_damaged_file_becomes_an_image_or_a_command_error(extension):
    """Random flips and cuts; set SRCNN_FUZZ for more of them."""
    whole, rng, limit = sample(extension), np.random.default_rng(list(extension.encode())), Image.MAX_IMAGE_PIXELS
    path, output, errors = Path(f"d.{extension}"), Path(f"o.{extension}"), 0
    for _ in range(MORE or 40):
        damaged = np.frombuffer(whole, np.uint8).copy()
        for _ in range(rng.integers(1, 5)):
            damaged[int(len(damaged) * rng.random() ** 2)] ^= 1 << rng.integers(8)  # more in the header
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(damaged))]
        path.write_bytes(damaged.tobytes())
        try:
            image = read_image(path, max_pixels=5000)
            assert image.mode in ("L", "LA", "RGB", "RGBA", "I;16")
            assert 1 <= image.width * image.height <= 5000
            check_output(output, image.size, image.mode)
            write_image(image, output, image.info)
            assert read_image(output).size == image.size
            output.unlink()
        except CommandError as error:
            assert str(error).startswith((f"{path}: ", f"{output}: "))  # noqa: PT017
            errors += 1
        assert [file.name for file in Path().iterdir()] == [path.name]
        assert limit == Image.MAX_IMAGE_PIXELS
    assert errors > 0

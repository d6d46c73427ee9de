"""Images in and out of super_resolve.py: modes, frames, metadata, formats, damage."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line, assert_same, expected
from PIL import Image, ImageCms, JpegImagePlugin
from PIL.PngImagePlugin import PngInfo

import super_resolve
from data import bicubic, read_frames
from utils import Failure

LUMA = [0.299, 0.587, 0.114]


@pytest.fixture
def upscaled(cli, pictures, tmp_path):
    """Upscale an image that is saved under a name, with Pillow's options; returns what Pillow reads of the output."""

    def call(image, name, output="", **options):
        image.save(name, **options)
        arguments = [f"--output={output}"] if output else []
        status, _, err = cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", name, *arguments)
        assert (status, err) == (0, "")
        stem, _, ending = name.partition(".")
        sr = Image.open(output or f"{stem}_srcnn_x3.{ending}")
        sr.load()
        return sr

    return call


def gray_of(model, lr):
    """What the network makes of a gray image."""
    return expected(model, lr.convert("RGB")) @ LUMA


def assert_gray(image, wanted):
    """The same but for two roundings: of red, green and blue, and of their mean."""
    assert np.shape(image) == wanted.shape
    difference = abs(np.asarray(image) - wanted)
    assert difference.max() < 1.1
    assert difference.mean() < 0.4


@pytest.mark.parametrize("name", ["g.png", "g.bmp", "g.tif", "g.pgm"])
def test_gray_stays_gray(upscaled, pictures, name):
    lr = pictures[0].convert("L")
    sr = upscaled(lr, name)
    assert sr.mode == "L"
    assert_gray(sr, gray_of(pictures[2], lr))


def test_one_bit_becomes_gray(upscaled, pictures):
    lr = pictures[0].convert("1")
    sr = upscaled(lr, "fax.tif", compression="group4")
    assert sr.mode == "L"
    assert_gray(sr, gray_of(pictures[2], lr))


@pytest.mark.parametrize("name", ["g.png", "g.tif", "g.pgm"])
def test_gray_of_16_bits_keeps_them(upscaled, pictures, name):
    values = np.asarray(pictures[0].convert("L")).astype(np.uint16) * 257
    values += np.random.default_rng(0).integers(-128, 129, values.shape).astype(np.uint16) * (values % 65535 > 0)
    sr = upscaled(Image.fromarray(values), name)
    assert sr.mode in ("I;16", "I")
    wanted = expected(pictures[2], np.repeat(values[..., None] / 257, 3, 2)) @ LUMA * 257
    difference = abs(np.asarray(sr) - wanted)
    assert difference.max() < 4  # of 65,535; 8 bits would be 128 off
    assert len(np.unique(sr)) > 2000


def test_big_endian_16_bits(upscaled, pictures):
    values = np.asarray(pictures[0].convert("L")).astype(np.uint16) * 257
    big, little = upscaled(Image.fromarray(values.astype(">u2")), "b.tif"), upscaled(Image.fromarray(values), "l.tif")
    assert np.array_equal(np.asarray(big), np.asarray(little))


def test_a_palette_becomes_rgb(upscaled, pictures):
    lr = pictures[0].quantize(17)
    sr = upscaled(lr, "p.png")
    assert sr.mode == "RGB"
    assert_same(sr, expected(pictures[2], lr.convert("RGB")))


# ----------------------------------------------------------------------------- alpha


def cut_out(lr):
    """A disc in which the picture is opaque, in a soft edge; around it nothing."""
    y, x = np.mgrid[:30, :30] - 14.5
    alpha = Image.fromarray(np.uint8((12 - np.hypot(x, y)).clip(0, 2) * 127.5))
    image = Image.new("RGB", lr.size)
    image.paste(lr, mask=alpha.point(lambda a: 255 * (a > 0)))
    return image, alpha


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_upscaled_by_bicubic(upscaled, pictures, name, mode):
    image, alpha = cut_out(pictures[0])
    image = image.convert(mode.removesuffix("A"))
    image.putalpha(alpha)
    sr = upscaled(image, name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    assert sr.mode == ("RGBA" if name == "a.webp" else mode)
    difference = abs(np.asarray(sr.getchannel("A")).astype(int) - np.asarray(bicubic(alpha, 90, 90)))
    assert difference.max() == 0
    inside = np.asarray(bicubic(alpha, 90, 90).reduce(5)) == 255  # far from the edge, which has other neighbours
    plain = expected(pictures[2], image.convert("RGB"))[2::5, 2::5]
    assert abs(np.asarray(sr.convert("RGB"))[2::5, 2::5][inside] - plain[inside]).max() < (24 if "webp" in name else 2)
    assert inside.sum() > 30


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_there_is_no_fringe_around_what_is_visible(upscaled, pictures, mode):
    """What is transparent is black in the file, what is visible has one colour: so it must be in the output."""
    _, alpha = cut_out(pictures[0])
    alpha = alpha.point(lambda a: 255 * (a > 100))
    colour = (210, 210, 210) if mode == "LA" else (210, 120, 40)
    image = Image.new("RGB", (30, 30))
    image.paste(colour, mask=alpha)
    if mode == "P":
        image = image.quantize(2)
        image.info["transparency"] = image.getpixel((0, 0))
    else:
        image = image.convert(mode)
        image.putalpha(alpha)
    sr = upscaled(image, "a.png").convert("RGBA")
    pixels, flat = np.asarray(sr).astype(int), expected(pictures[2], Image.new("RGB", (9, 9), colour))[12, 12]
    assert (pixels[..., 3] == np.asarray(bicubic(alpha, 90, 90))).all()
    flat = flat @ LUMA if mode == "LA" else flat
    visible = pixels[pixels[..., 3] > 0][:, :3]
    assert 0 < len(visible) < 90 * 90
    assert abs(visible - flat).max() <= (1.1 if mode == "LA" else 0.51)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_a_colour_that_stands_for_transparency(upscaled, pictures, mode):
    if mode == "I;16":
        image, key = Image.fromarray(np.asarray(pictures[0].convert("L")).astype(np.uint16) * 257), None
        key = image.getpixel((3, 3))
    else:
        image = pictures[0].convert(mode)
        key = image.getpixel((3, 3)) and 1 if mode == "1" else image.getpixel((3, 3))
    sr = upscaled(image, "t.png", transparency=key)
    assert sr.mode == ("RGBA" if mode == "RGB" else "LA")
    same = (np.atleast_3d(np.asarray(image)) == np.atleast_1d(key)).all(2)
    wanted = bicubic(Image.fromarray(np.uint8(255 * ~same)), 90, 90)
    assert np.array_equal(sr.getchannel("A"), wanted)


@pytest.mark.parametrize("output", ["o.jpg", "o.bmp", "o.ppm"])
def test_a_format_without_alpha_is_an_error_before_any_work(cli, pictures, output, monkeypatch):
    pictures[0].convert("RGBA").save("a.png")
    monkeypatch.setattr(super_resolve, "enlarge", None)
    status, out, err = cli("super_resolve.py", "--checkpoint=net", "a.png", f"--output={output}")
    assert (status, out) == (1, "")
    assert_one_line(err, output, "holds no transparency", "--output=NAME.png")


@pytest.mark.parametrize("output", ["o.jpg", "o.bmp", "o.webp", "o.gif"])
def test_a_format_without_16_bits_is_an_error_before_any_work(cli, pictures, output, monkeypatch):
    Image.new("I;16", (3, 3)).save("a.png")
    monkeypatch.setattr(super_resolve, "enlarge", None)
    status, out, err = cli("super_resolve.py", "--checkpoint=net", "a.png", f"--output={output}")
    assert (status, out) == (1, "")
    assert_one_line(err, output, "holds no gray of 16 bits", "--output=NAME.png")


@pytest.mark.parametrize(("width", "output"), [(5462, "o.webp"), (21834, "o.jpg"), (21846, "o.gif")])
def test_too_large_for_the_format(cli, pictures, width, output, monkeypatch):
    Image.new("L", (width, 1)).save("wide.png")
    monkeypatch.setattr(super_resolve, "enlarge", None)
    status, out, err = cli("super_resolve.py", "--checkpoint=net", "wide.png", f"--output={output}")
    assert (status, out) == (1, "")
    assert_one_line(err, output, f"{3 * width} pixels", "--output=NAME.png")
    name = super_resolve.format_of(super_resolve.Path(output))
    with pytest.raises(
        (OSError, ValueError, OverflowError, struct.error)
    ):  # and one pixel more than the limit is too many for Pillow
        Image.new("RGB", (super_resolve.FORMATS[name].side + 1, 1)).save(io.BytesIO(), name)


# ----------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", ["f.gif", "f.png", "f.webp", "f.tif"])
def test_each_frame(upscaled, pictures, name):
    lr, _, model = pictures
    lr = lr.quantize(40).convert("RGB")
    frames = [lr, lr.transpose(Image.Transpose.ROTATE_90), lr.point(lambda v: v // 2)]
    options = {"duration": [40, 70, 100], "loop": 3} if name != "f.tif" else {}
    options |= {"lossless": True} if name == "f.webp" else {}
    sr = upscaled(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert sr.n_frames == 3
    for i, frame in enumerate(frames):
        sr.seek(i)
        sr.load()
        difference = abs(np.asarray(sr.convert("RGB")) - expected(model, frame))
        assert difference.mean() < {"f.gif": 12, "f.webp": 6}.get(name, 0.26)
        if options:
            assert (sr.info["duration"], sr.info["loop"]) == (options["duration"][i], 3)


def test_pages_of_several_sizes_and_modes(upscaled, pictures):
    lr, _, model = pictures
    pages = [lr, lr.crop((0, 0, 9, 20)).convert("L"), lr.convert("1")]
    sr = upscaled(pages[0], "f.tif", save_all=True, append_images=pages[1:])
    frames = read_frames("f_srcnn_x3.tif")
    assert [(f.mode, f.size) for f in frames] == [("RGB", (90, 90)), ("L", (27, 60)), ("L", (90, 90))]
    assert sr.n_frames == 3
    assert_same(frames[0], expected(model, lr))
    assert_gray(frames[1], gray_of(model, pages[1]))


def test_an_animation_with_transparent_parts(upscaled, pictures):
    image, alpha = cut_out(pictures[0])
    alpha = alpha.point(lambda a: 255 * (a > 100))
    frames = []
    for mask in (alpha, alpha.transpose(Image.Transpose.ROTATE_90).crop((5, 0, 35, 30))):
        frames.append(image.copy())
        frames[-1].putalpha(mask)
    for name in ("f.gif", "f.png", "f.webp"):
        sr = upscaled(frames[0], name, save_all=True, append_images=frames[1:], duration=50, disposal=2)
        assert sr.n_frames == 2
        for i, frame in enumerate(frames):
            sr.seek(i)
            visible = np.asarray(sr.convert("RGBA").getchannel("A")) >= 128
            wanted = np.asarray(bicubic(frame.getchannel("A"), 90, 90)) >= 128
            assert (visible != wanted).mean() < (0.01 if name == "f.webp" else 1e-9), (name, i)


def test_frames_that_are_empty_or_repeated_keep_their_place(upscaled, pictures):
    """What is seen at each moment is the same, though Pillow stores frames that are alike as one."""
    lr = pictures[0].convert("RGBA")
    empty, other = Image.new("RGBA", lr.size), lr.transpose(Image.Transpose.ROTATE_180)
    frames, times = [lr, empty, lr, empty, empty, other, other], [100, 200, 300, 400, 50, 50, 70]
    frames[0].save("b.webp", save_all=True, append_images=frames[1:], duration=times, lossless=True)
    wanted = [
        bool(frame.getchannel("A").getextrema()[1])
        for frame, time in zip(frames, times, strict=True)
        for _ in range(time)
    ]
    for name in ("o.png", "o.webp", "o.gif"):
        sr = upscaled(frames[0], "b.webp", name, save_all=True, append_images=frames[1:], duration=times, lossless=True)
        seen = []
        for i in range(sr.n_frames):
            sr.seek(i)
            sr.load()
            seen += [bool(sr.convert("RGBA").getchannel("A").getextrema()[1])] * int(sr.info["duration"])
        assert seen == wanted, name
        assert sr.info["loop"] == 0


def test_the_picture_for_who_shows_no_animation_is_no_frame(upscaled, pictures):
    frames = [pictures[0].rotate(turn) for turn in (0, 90, 180)]
    sr = upscaled(frames[0], "d.png", save_all=True, append_images=frames[1:], duration=[50, 70], default_image=True)
    assert sr.n_frames == 2
    assert_same(sr.convert("RGB"), expected(pictures[2], frames[1]))


def test_a_text_of_that_name_makes_no_such_picture(upscaled, pictures):
    """Pillow keeps texts of a PNG where it notes that there is one."""
    text = PngInfo()
    text.add_text("default_image", "yes")
    assert_same(upscaled(pictures[0], "t.png", pnginfo=text), expected(pictures[2], pictures[0]))


def test_the_picture_for_who_shows_no_animation_is_refused_before_it_is_decoded(pictures):
    """Its data are damaged, which would be said if they were read."""
    frames = [pictures[0].rotate(turn) for turn in (0, 90, 180)]
    frames[0].save("d.png", save_all=True, append_images=frames[1:], default_image=True)
    content = Path("d.png").read_bytes()
    start = content.index(b"IDAT") + 4
    Path("d.png").write_bytes(content[:start] + bytes(20) + content[start + 20 :])
    with pytest.raises(Failure, match="30x30 pixels in frame 1 of 3 are too many"):
        read_frames(Path("d.png"), max_pixels=899)
    with pytest.raises(Failure, match="not an image that can be read"):
        read_frames(Path("d.png"))


@pytest.mark.parametrize("other", [Image.new("L", (9, 9)), Image.new("I;16", (30, 30))])
@pytest.mark.parametrize("output", ["o.png", "o.webp", "o.gif"])
def test_pages_that_are_no_animation(cli, pictures, other, output):
    pictures[0].save("p.tif", save_all=True, append_images=[other])
    status, out, err = cli("super_resolve.py", "--checkpoint=net", "p.tif", f"--output={output}")
    assert (status, out) == (1, "")
    assert_one_line(err, output, "holds")


def test_pixels_are_counted_in_all_pages(cli, pictures):
    pages = [Image.new("L", (4, 4)), *(Image.new("L", (30, 30)) for _ in range(3))]
    pages[0].save("p.tif", save_all=True, append_images=pages[1:])
    command = ("super_resolve.py", "--precision=fp32", "--checkpoint=net", "p.tif")
    status, _, err = cli(*command, "--max-pixels=2715")
    assert status == 1
    assert_one_line(err, "30x30 pixels in frame 4 of 4", "--max-pixels")
    assert cli(*command, "--max-pixels=2716")[0] == 0


def test_the_first_frame_where_the_format_holds_one(cli, pictures):
    lr = pictures[0]
    lr.save("f.gif", save_all=True, append_images=[lr.point(lambda v: 255 - v)])
    status, out, err = cli("super_resolve.py", "--precision=fp32", "--checkpoint=net", "f.gif", "--output=o.bmp")
    assert (status, err) == (0, "")
    assert "f.gif: 2 frames, of which BMP holds one" in out
    assert_same(Image.open("o.bmp"), expected(pictures[2], Image.open("f.gif").convert("RGB")))


# --------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.webp", "e.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(upscaled, pictures, name, orientation):
    lr = pictures[0].crop((0, 0, 24, 15))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    options = {"quality": 100, "subsampling": 0} if name == "e.jpg" else {"lossless": True}
    sr = upscaled(lr, name, exif=exif, **(options if name in ("e.jpg", "e.webp") else {}))
    with Image.open(name) as stored:
        stored = np.asarray(stored.convert("RGB").crop((0, 0, 24, 15)))  # convert() keeps pixels as they are stored
        stored = np.asarray(lr) if name == "e.tif" else stored  # but for TIFF, which Pillow turns by itself
    turned = [stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    turned += [np.rot90(stored, -1), stored[::-1, ::-1].swapaxes(0, 1), np.rot90(stored)]
    upright = [stored, *turned][orientation - 1].copy()
    assert sr.getexif().get(0x0112, 1) == 1
    difference = abs(np.asarray(sr) - expected(pictures[2], upright))
    assert difference.mean() < (5 if name in ("e.jpg", "e.webp") else 0.26)
    if name != "e.tif":
        assert sr.getexif()[0x010F] == "a camera"


@pytest.mark.parametrize("name", ["m.jpg", "m.png", "m.tif", "m.webp", "m.bmp"])
def test_icc_profile_and_print_size_are_kept(upscaled, pictures, name):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sr = upscaled(pictures[0], name, icc_profile=profile, dpi=(96, 72))
    if name != "m.bmp":
        assert sr.info["icc_profile"] == profile
    if name != "m.webp":
        assert sr.info["dpi"] == pytest.approx((288, 216), abs=0.05)


def test_the_resolution_in_exif_data_is_kept(upscaled, pictures):
    exif = Image.Exif()
    exif[0x011A], exif[0x011B], exif[0x0128] = 96.0, 72.0, 2
    sr = upscaled(pictures[0], "m.webp", exif=exif)
    assert (sr.getexif()[0x011A], sr.getexif()[0x011B]) == (288, 216)


@pytest.mark.parametrize(("name", "output", "mode"), [("g.png", "o.webp", "L"), ("p.png", "o.png", "RGB")])
def test_a_profile_of_another_kind_of_image_is_dropped(upscaled, pictures, name, output, mode):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"GRAY" if mode == "L" else b"Lab "
    image = pictures[0].convert(mode)
    assert "icc_profile" not in upscaled(image, name, output, icc_profile=bytes(profile)).info
    if mode == "L":
        assert upscaled(image, name, "o.png", icc_profile=bytes(profile)).info["icc_profile"] == profile


def test_jpeg_has_quality_95_and_colour_at_full_resolution(upscaled, pictures):
    sr = upscaled(pictures[0], "j.jpg", quality=50)
    buffer = io.BytesIO()
    sr.save(buffer, "JPEG", quality=95)
    assert sr.quantization == Image.open(buffer).quantization
    assert JpegImagePlugin.get_sampling(sr) == 0  # 4:4:4


@pytest.mark.parametrize("dpi", [(0, 0), (30000, 30000)])
def test_absurd_dpi_are_dropped(upscaled, pictures, dpi):
    assert upscaled(pictures[0], "m.jpg", dpi=dpi).info.get("dpi", (72, 72)) == (72, 72)


@pytest.mark.filterwarnings("error")
def test_damaged_exif_data_do_no_harm(upscaled, pictures):
    sr = upscaled(pictures[0], "e.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=100, subsampling=0)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        lr = Image.open("e.jpg")
    assert_same(sr, expected(pictures[2], lr), levels=16)


def test_cmyk_becomes_rgb(upscaled, pictures):
    inks = pictures[0].convert("CMYK")
    sr = upscaled(inks, "c.tif", icc_profile=b"damaged")
    assert (sr.mode, sr.info.get("icc_profile")) == ("RGB", None)
    assert_same(sr, expected(pictures[2], inks.convert("RGB")))


def test_the_profile_of_inks_tells_their_colours(upscaled, pictures):
    """By this one full cyan alone is the colour Lab (60, 40, 30), a red; all else is white."""
    lab = [(60 * 255 // 100, 40 + 128, 30 + 128) if inks == 0b1000 else (255, 128, 128) for inks in range(16)]
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut += ramp * 4 + bytes(sum(lab, ())) + ramp * 3
    size = 128 + 4 + 12 + len(lut)
    header = struct.pack(
        ">I4x4s4s4s4s12x4s28x3i", size, bytes([2, 0x20, 0, 0]), b"prtr", b"CMYK", b"Lab ", b"acsp", 63190, 65536, 54061
    )
    profile = header.ljust(128, b"\0") + struct.pack(">I4s2I", 1, b"A2B0", 144, len(lut)) + lut
    cyan = Image.new("CMYK", (10, 10), (255, 0, 0, 0))
    sr = upscaled(cyan, "c.tif", icc_profile=profile)
    red = np.array([219, 116, 94])  # of Lab (60, 40, 30) in sRGB
    got = expected(pictures[2], Image.new("RGB", (9, 9), tuple(red.tolist())))[12, 12]
    assert abs(np.asarray(sr)[15, 15] - got).max() < 6
    assert "icc_profile" not in sr.info


# ----------------------------------------------------------------------------- damage


def samples():
    """A small valid file of each format, as bytes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize((24, 20))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {}
    for name, options in {
        "bmp": {},
        "png": {"exif": exif, "icc_profile": profile, "dpi": (72, 72)},
        "jpg": {"exif": exif, "icc_profile": profile, "dpi": (72, 72)},
        "webp": {"exif": exif, "icc_profile": profile},
        "tif": {"compression": "tiff_lzw", "dpi": (72, 72)},
        "gif": {"save_all": True, "append_images": [image.rotate(90)]},
        "ppm": {},
    }.items():
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()["." + name], **options)
        files[name] = buffer.getvalue()
    return files


SAMPLES = samples()


@pytest.mark.parametrize("ending", SAMPLES)
def test_damaged_files_end_in_an_image_or_in_one_clear_line(cli, pictures, tmp_path, ending):
    """Random flips and cuts; for more of them set SRCNN_FUZZ, of which 2000 take some minutes."""
    whole, rng = SAMPLES[ending], np.random.default_rng(list(ending.encode()))
    ends = {0: 0, 1: 0}
    for _ in range(int(os.environ.get("SRCNN_FUZZ", 40))):
        damaged = np.frombuffer(whole, np.uint8).copy()
        for _ in range(rng.integers(1, 5)):
            damaged[int(len(damaged) * rng.random() ** 2)] ^= 1 << rng.integers(8)  # more in the header
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(damaged))]
        (tmp_path / f"d.{ending}").write_bytes(damaged.tobytes())
        status, _, err = cli(
            "super_resolve.py", "--precision=fp32", "--checkpoint=net", "--max-pixels=5000", f"d.{ending}"
        )
        output = tmp_path / f"d_srcnn_x3.{ending}"
        assert (status, output.exists()) in ((0, True), (1, False)), damaged.tobytes()
        if status:
            assert_one_line(err, f"d.{ending}: ")
        else:
            assert err == ""
            for frame in read_frames(output):
                assert min(frame.size) >= 3
            output.unlink()
        assert not list(tmp_path.glob("*.part"))
        ends[status] += 1
    print(f"{ending}: {ends[0]} images, {ends[1]} errors")
    assert ends[1] > 0

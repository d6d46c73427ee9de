import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line, random_image
from PIL import Image

import data
from imaging.dead_leaves import dead_leaves
from imaging.image_sets import ImageFiles
from imaging.images import bicubic, to_image
from imaging.metrics import measure
from training.options import Options
from training.random_patches import RandomPatches
from utils import CommandError

# ------------------------------------------------------------------------- reading the sets


def test_published_set_is_recognized_by_content(real_data, tmp_path):
    renamed = tmp_path / "elsewhere"
    renamed.mkdir()
    for file in (real_data / "Set5").iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    (renamed / "._baby_GT.bmp").write_text("hidden file of macOS")
    set5 = data.load_images("elsewhere", "test")
    assert (set5.name, list(set5.images)) == ("Set5", ["baby", "bird", "butterfly", "head", "woman"])
    Image.new("RGB", (9, 9)).save(renamed / "extra_GT.png")
    assert data.load_images("elsewhere", "test").name == "elsewhere"


@pytest.mark.parametrize(("folder", "name"), [("set-5", "set-5 (not the published set)"), ("a\x1b", "a\\x1b")])
def test_other_images_are_not_named_like_published_set(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / folder / "baby_GT.bmp")
    image_set = data.load_images(folder, "test")
    assert (image_set.name, list(image_set.images)) == (name, ["baby"])


def test_set_may_have_file_names_that_are_not_utf8(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / os.fsdecode(b"\xff.bmp"))
    image_set = data.load_images(str(tmp_path), "train")
    assert (image_set.name, list(image_set.images)) == (tmp_path.name, ["\\udcff"])


def test_large_files_are_not_read_to_recognize_published_set(tmp_path, monkeypatch):
    """A video would fill the memory."""
    files = [tmp_path / "a.bmp", tmp_path / "video.mpg"]
    for file in files:
        file.write_bytes(b"ab")
    digest = data.published_sets.digest((file.name, b"ab") for file in files)
    monkeypatch.setattr(data.published_sets, "SETS", {"Set9": digest})
    assert data.name_of_set(tmp_path, files) == "Set9"
    with files[1].open("wb") as file:
        file.truncate(data.published_sets.MAX_FILE + 1)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert data.name_of_set(tmp_path, files) == tmp_path.name


def test_outputs_beside_the_images_are_not_part_of_the_set(tmp_path, monkeypatch, capfd):
    Image.new("RGB", (9, 9)).save(tmp_path / "a_GT.bmp")
    digest = data.published_sets.digest([("a_GT.bmp", (tmp_path / "a_GT.bmp").read_bytes())])
    monkeypatch.setattr(data.published_sets, "SETS", {"Set9": digest})
    for suffix in ("_srcnn_x3.bmp", "_srcnn_x3_comparison.png"):
        Image.new("RGB", (27, 27)).save(tmp_path / f"a_GT{suffix}")
    for role in ("train", "test"):
        image_set = data.load_images(str(tmp_path), role)
        assert (image_set.name, list(image_set.images)) == ("Set9", ["a"])
        assert_one_line(capfd.readouterr().err, "WARNING", "skipping 2 earlier outputs of super_resolve.py")
    assert data.is_published(tmp_path, "Set9")


def test_images_of_any_format_and_mode_have_unique_names(tmp_path):
    gray = Image.linear_gradient("L").crop((0, 0, 30, 60))
    gray.save(tmp_path / "a.tiff")
    gray.save(tmp_path / "a.jpg")
    gray.convert("RGBA").save(tmp_path / "c\x1b.png")
    gray.save(tmp_path / "c_GT.png")
    images = data.load_images(str(tmp_path), "train").images
    modes = {"a.jpg": "L", "a.tiff": "L", "c\\x1b.png": "RGB", "c_GT.png": "L"}
    assert list(images) == list(modes)
    assert {name: image.mode for name, image in images.items()} == modes
    assert {image.size for image in images.values()} == {(30, 60)}


@pytest.mark.parametrize(("hr", "lr"), [("GT", "lr"), ("HR", "LR")])
def test_only_ground_truths_are_tested_on(tmp_path, capfd, hr, lr):
    """In the course's folder of examples, and in a published copy of test sets."""
    for name in (f"a_{hr}.png", f"a_{lr}.png", "a_bicubic.png", f"b_{hr}.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    assert list(data.load_images(str(tmp_path), "test").images) == ["a", "b"]
    assert_one_line(capfd.readouterr().err, "WARNING", tmp_path, "2 images", f"_{hr}")


def test_hr_suffix_has_no_meaning_without_lr_images(tmp_path, capfd):
    for name in ("a_HR.png", "b.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    assert list(data.load_images(str(tmp_path), "test").images) == ["a_HR", "b"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("", "^: no such folder of images; specify an existing folder with --train-data=DIR$"),
        ("small/a.png", r"^small/a\.png: no such folder of images; specify an existing folder with --train-data=DIR$"),
        (
            "no/Set5",
            r"^no/Set5: .*; run `python data\.py` to download Set5, or specify an existing folder with --train-data=D",
        ),
        ("small", r"^small/a\.png: 8x20 pixels .*9x9$"),
    ],
)
def test_bad_folder_is_named(folder, problem):
    Path("small").mkdir()
    Image.new("RGB", (8, 20)).save("small/a.png")
    with pytest.raises(CommandError, match=problem):
        data.load_images(folder, "train")


def test_all_images_that_cannot_be_read_are_named(tmp_path, capfd):
    for name in ("a.png", "c\x1b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n")
    for name, side in (("b.png", 9), ("d.png", 8)):
        Image.new("RGB", (9, side)).save(tmp_path / name)
    with pytest.raises(CommandError, match=r"^3 of 4 images cannot be used; "):
        data.load_images(str(tmp_path), "train")
    a, c, d = capfd.readouterr().err.splitlines()
    assert a.startswith(f"error: {tmp_path}/a.png: not an image")
    assert c.startswith(f"error: {tmp_path}/c\\x1b.png: not an image")
    assert d == f"error: {tmp_path}/d.png: 9x8 pixels is too small; the minimum is 9x9"


def test_missing_folder_on_another_node_is_named_with_node(monkeypatch):
    monkeypatch.setattr(data, "node_rank", lambda: 1)
    with pytest.raises(CommandError, match=r"^a: no such folder .*node 1"):
        data.load_images("a", "train")


@pytest.mark.parametrize("other", [("train", 1), ("test", 2)], ids=["fewer images", "other images of same sizes"])
def test_nodes_must_have_same_training_images(monkeypatch, other):
    checksums, images = [], dead_leaves("train", 2, 30)
    monkeypatch.setattr(data, "all_gather", lambda own: checksums.append(own) or checksums)  # a node more at each call
    monkeypatch.setattr(data, "load_images", lambda *_: data.ImageSet("leaves", images))
    for _ in range(2):
        assert data.load_sets("dead-leaves", "dead-leaves", 0, 3)[0].images == images
    images = dead_leaves(*other, 30)
    with pytest.raises(CommandError, match=r"^dead-leaves: the nodes have different images"):
        data.load_sets("dead-leaves", "dead-leaves", 0, 3)


# -------------------------------------------------------------------------- large sets


def test_large_set_has_the_same_images_as_a_small_one(photos, monkeypatch):
    small, large = (data.load_images(str(photos), "test", pixels) for pixels in (math.inf, 0))
    assert isinstance(large.images, ImageFiles)
    assert (large.name, list(large.images)) == (small.name, list(small.images))
    assert all(large.images[name].tobytes() == image.tobytes() for name, image in small.images.items())
    assert np.array_equal(large.sizes(), small.sizes())
    a, b = data.TestSet(small, 3), data.TestSet(large, 3)
    for name, image in a.images.items():
        assert torch.equal(b.images[name].hr, image.hr)
        assert torch.equal(b.images[name].bicubic, image.bicubic)
        assert (b.images[name].lr, b.images[name].bicubic_quality) == (image.lr, image.bicubic_quality)
    monkeypatch.setattr(data, "TEST_PIXELS", 0)
    assert isinstance(data.load_sets(str(photos), str(photos), 0, 3)[1].images, data.TestImages)
    training, test = large.split(3)
    assert (list(training.images), list(test.images)) == (["leaves1", "leaves3", "leaves4"], ["leaves2", "leaves5"])
    assert training.images["leaves3"].size == (30, 41)
    assert training.sizes().tolist() == [[96, 90], [30, 41], [64, 64]]


def test_fingerprint_of_large_set_depends_on_sizes_of_images_and_files():
    for folder, size, length in (("a", (20, 10), 0), ("b", (20, 10), 0), ("c", (10, 20), 0), ("d", (20, 10), 1)):
        Path(folder).mkdir()
        Image.new("L", size).save(f"{folder}/{folder}.bmp")
        with open(f"{folder}/{folder}.bmp", "ab") as file:
            file.write(bytes(length))
        Image.new("L", (9, 9)).save(f"{folder}/x{'y' * (folder == 'b')}.bmp")
    a, b, c, d = (data.load_images(folder, "train", 0).fingerprint() for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_bad_headers_of_large_set_are_named(tmp_path, capfd):
    for i in range(4):
        Image.new("RGB", (30, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n")
    Image.new("RGB", (8, 20)).save(tmp_path / "3.png")
    with pytest.raises(CommandError, match=r"^2 of 4 images cannot be used; "):
        data.load_images(str(tmp_path), "train", 100)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith(f"error: {tmp_path}/1.png: not an image")
    assert second == f"error: {tmp_path}/3.png: 8x20 pixels is too small; the minimum is 9x9"


def test_warning_about_image_of_large_set_is_shown_once(tmp_path, capfd):
    Image.new("L", (30, 30)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (30, 30), 9)])
    images = data.load_images(str(tmp_path), "train", 0).images
    for _ in range(3):
        assert images["a"].size == (30, 30)
    assert_one_line(capfd.readouterr().err, "WARNING", "a.gif", "only the first of its frames is read")


# ------------------------------------------------------------------------ held-out images

FIVE = data.ImageSet("x", {name: Image.new("L", (1, 1), value) for value, name in enumerate("abcde")})


@pytest.mark.parametrize(("hold_out", "held_out"), [(2, "bd"), (3, "be"), (5, "c")])
def test_split_holds_out_one_of_so_many_images(hold_out, held_out):
    training, test = FIVE.split(hold_out)
    assert training.images == {name: FIVE.images[name] for name in "abcde" if name not in held_out}
    assert test.images == {name: FIVE.images[name] for name in held_out}
    assert (training.name, test.name) == (f"x (without 1 of {hold_out})", f"x (1 of {hold_out})")


@pytest.mark.parametrize("hold_out", [1, 12])
def test_split_into_empty_set_is_refused(hold_out):
    with pytest.raises(
        CommandError, match=f"^x: too few images .5. to hold out 1 of {hold_out}; use another --hold-out$"
    ):
        FIVE.split(hold_out)


def test_fingerprint_depends_on_sizes_and_pixels_but_not_on_names_and_order():
    image, turned = Image.frombytes("L", (2, 1), b"ab"), Image.frombytes("L", (1, 2), b"ab")
    other = Image.frombytes("L", (2, 1), b"ac")
    sets = [(image, turned), (turned, image.convert("RGB")), (image, other), (image, image), (image,)]
    found = [data.ImageSet("x", dict(enumerate(images))).fingerprint() for images in sets]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_too_many_test_images_are_refused(photos, monkeypatch):
    monkeypatch.setattr(data, "MAX_TEST_IMAGES", 4)
    with pytest.raises(CommandError, match=f"^{photos.name}: 5 test images are too many; the maximum is 4$"):
        data.load_sets(str(photos), str(photos), 0, 3)
    assert len(data.load_sets(str(photos), "none", 2, 3)[1].images) == 2


# ----------------------------------------------------------------------------- LR/HR pairs


def test_lr_images_of_course_are_reproduced_exactly(real_data):
    folder = real_data / "image_examples"  # not part of the published sets
    if not folder.is_dir():
        pytest.skip(f"needs the course's images in {folder}")
    for name in ("baby", "bird", "butterfly", "head", "woman"):
        hr, lr = (Image.open(folder / f"{name}_{kind}.bmp").convert("RGB") for kind in ("GT", "lr"))
        assert bicubic(hr, lr.size).tobytes() == lr.tobytes()


@pytest.mark.parametrize(("scale", "size"), [(2, (100, 82)), (3, (99, 81)), (4, (100, 80))])
def test_test_set_follows_protocol(photos, scale, size):
    """An image is cropped to a multiple of the scale, reduced by Pillow, and enlarged for comparison."""
    test_set = data.TestSet(data.load_images(str(photos), "test"), scale)
    assert (test_set.name, list(test_set.images)) == (photos.name, [f"leaves{i}" for i in range(1, 6)])
    lr, hr, upscaled, bicubic_quality = test_set.images["leaves5"]
    image = Image.open(photos / "leaves5.png").crop((0, 0, *size))
    assert to_image(hr) == image
    assert lr == image.resize((size[0] // scale, size[1] // scale), Image.Resampling.BICUBIC)
    assert to_image(upscaled) == lr.resize(size, Image.Resampling.BICUBIC)
    assert bicubic_quality == measure(upscaled, hr, scale)


def test_gray_image_is_measured_as_gray_and_trained_on_as_rgb():
    for folder, mode in (("gray", "L"), ("color", "RGB")):
        Path(folder).mkdir()
        random_image("L", (45, 36)).convert(mode).save(f"{folder}/a.png")
    gray, color = (data.TestSet(data.load_images(name, "test"), 3).images["a"] for name in ("gray", "color"))
    assert (gray.lr.mode, gray.hr.shape, color.hr.shape) == ("L", (1, 36, 45), (3, 36, 45))
    assert gray.bicubic_quality == measure(gray.bicubic, gray.hr, 3)
    a, b = (RandomPatches(data.load_images(name, "train"), 9, 3, torch.device("cpu")) for name in ("gray", "color"))
    assert torch.equal(a.hr.pixels, b.hr.pixels)
    assert torch.equal(a.lr.pixels, b.lr.pixels)


# ------------------------------------------------------------------------- finding the sets


@pytest.mark.parametrize(
    ("given", "replaced", "facts"),
    [
        ({}, ("train_data", "test_data"), ("--train-data AND --test-data", "91-image and Set5")),
        ({"test_data": "here"}, ("train_data",), ("--train-data", "91-image")),
        ({"train_data": "here"}, ("test_data",), ("--test-data", "Set5")),
        ({"train_data": "here", "hold_out": 2}, (), ()),
        ({"train_data": "dead-leaves", "test_data": "dead-leaves"}, (), ()),
    ],
    ids=["no set given", "test set given", "training set given", "test set held out", "generated sets given"],
)
def test_new_run_replaces_missing_default_set_by_generated_images(offline, capfd, given, replaced, facts):
    Path("here").mkdir()
    folders = Options.from_args(given).folders()
    found = data.find_data(folders, given, fresh=True)
    assert found == folders | dict.fromkeys(replaced, "dead-leaves")
    err = capfd.readouterr().err
    if replaced:
        address, warning = err.splitlines()
        assert address.startswith("http://127.0.0.1:9/archive.zip: ")
        assert warning.startswith("WARNING: GENERATED IMAGES ARE USED FOR {}: cannot fetch {}; ".format(*facts))
        assert warning.endswith("`python data.py --from FILE` here")
    else:
        assert err == ""


def test_only_the_set_that_is_not_found_is_replaced(monkeypatch, capfd):
    def fetch(names):
        Path("data/91-image").mkdir(parents=True)
        raise CommandError("cannot fetch Set5")

    monkeypatch.setattr(data.published_sets, "fetch", fetch)
    found = data.find_data(Options().folders(), {}, fresh=True)
    assert found == {"train_data": "data/91-image", "test_data": "dead-leaves"}
    assert capfd.readouterr().err == "WARNING: GENERATED IMAGES ARE USED FOR --test-data: cannot fetch Set5\n"


@pytest.mark.parametrize(
    ("given", "fresh", "problem"),
    [
        ({"train_data": "data/91-image"}, True, "^data/91-image: no such .* --train-data=DIR$"),
        ({"test_data": "here"}, True, "^here: no such .* --test-data=DIR$"),
        (
            {},
            False,
            "^cannot fetch 91-image and Set5; .* or specify another folder with --train-data=DIR and --test-data=DIR$",
        ),
        ({"hold_out": 2}, False, "^cannot fetch 91-image; .* or specify another folder with --train-data=DIR$"),
    ],
    ids=["training folder given", "test folder given", "run resumed", "run with held-out images resumed"],
)
def test_other_missing_set_is_never_replaced(offline, given, fresh, problem):
    with pytest.raises(CommandError, match=problem):
        data.find_data(Options.from_args(given).folders(), given, fresh)


def test_course_folder_is_used_where_default_folder_is_missing():
    for name in ("train", "test", "Set5"):
        Path("data", name).mkdir(parents=True)
    assert data.default_folder("data/91-image") == "data/train"
    assert data.default_folder("data/Set5") == "data/Set5"
    assert data.default_folder("data/other") == "data/other"
    folders = {"train_data": "data/train", "test_data": "data/Set5"}
    assert data.find_data(Options().folders(), {}, fresh=True) == folders

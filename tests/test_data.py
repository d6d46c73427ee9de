from pathlib import Path

import pytest
import torch
from helpers import random_image
from PIL import Image

import data
from imaging.dead_leaves import dead_leaves
from imaging.images import bicubic, to_image
from imaging.metrics import psnr
from training.random_patches import RandomPatches
from utils import CommandError


def test_the_published_sets_are_known_by_their_content(real_data, tmp_path):
    renamed = tmp_path / "elsewhere"
    renamed.mkdir()
    for file in (real_data / "Set5").iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    (renamed / "._baby_GT.bmp").write_text("what macOS leaves behind is not read")
    set5 = data.load_images("elsewhere", "test")
    assert (set5.name, list(set5.images)) == ("Set5", ["baby", "bird", "butterfly", "head", "woman"])
    Image.new("RGB", (9, 9)).save(renamed / "extra_GT.png")
    assert data.load_images("elsewhere", "test").name == "elsewhere"


@pytest.mark.parametrize(("folder", "name"), [("set-5", "set-5 (not the published set)"), ("a\x1b", "a\\x1b")])
def test_nothing_else_is_called_by_a_published_name(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / folder / "baby_GT.bmp")
    image_set = data.load_images(folder, "test")
    assert (image_set.name, list(image_set.images)) == (name, ["baby"])


def test_any_images_will_do_each_under_a_name_of_its_own(tmp_path):
    gray = Image.linear_gradient("L").crop((0, 0, 30, 60))
    gray.save(tmp_path / "a.tiff")
    gray.save(tmp_path / "a.jpg")
    gray.convert("RGBA").save(tmp_path / "c\x1b.png")
    gray.save(tmp_path / "c_GT.png")
    image_set = data.load_images(str(tmp_path), "train")
    assert list(image_set.images) == ["a.jpg", "a.tiff", "c\\x1b.png", "c_GT.png"]
    assert [image.mode for image in image_set.images.values()] == ["L", "L", "RGB", "L"]
    assert {image.size for image in image_set.images.values()} == {(30, 60)}


def test_of_a_published_set_only_files_of_its_sizes_are_read(tmp_path, monkeypatch):
    """For its digest; a video would fill the memory."""
    files = [tmp_path / "a.bmp", tmp_path / "video.mpg"]
    for file in files:
        file.write_bytes(b"ab")
    digest = data.published_sets.digest((f.name, b"ab") for f in files)
    monkeypatch.setattr(data.published_sets, "SETS", {"Set9": digest})
    assert data.name_of_set(tmp_path, files) == "Set9"
    with files[1].open("wb") as file:
        file.truncate(data.published_sets.MAX_FILE + 1)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert data.name_of_set(tmp_path, files) == tmp_path.name


def test_of_the_courses_test_images_only_the_ground_truths_are_read(tmp_path, capfd):
    for name in ("a_GT.png", "a_lr.png", "a_bicubic.png", "b_GT.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    assert list(data.load_images(str(tmp_path), "test").images) == ["a", "b"]
    assert capfd.readouterr().err == f"WARNING: {tmp_path}: skipping 2 images whose names do not end in _GT\n"


def test_bad_folders_are_named():
    Path("small").mkdir()
    Image.new("RGB", (8, 20)).save("small/a.png")
    for folder in ("", "small/a.png"):
        with pytest.raises(CommandError, match=f"^{folder}: no such folder of images$"):
            data.load_images(folder, "train")
    with pytest.raises(CommandError, match=r"^small/a\.png: 8x20 pixels are too few; the minimum is 9x9$"):
        data.load_images("small", "train")


def test_another_node_is_told_that_it_needs_the_data(monkeypatch):
    monkeypatch.setattr(data, "node_rank", lambda: 1)
    with pytest.raises(CommandError, match=r"^a: no such folder of images on node 1; each node needs the data, copied"):
        data.load_images("a", "train")


def test_every_node_needs_the_same_training_images(monkeypatch):
    def load(images, *other_nodes):
        leaves = data.ImageSet("leaves", images)
        monkeypatch.setattr(data, "load_images", lambda folder, role: leaves)
        monkeypatch.setattr(data, "gather", lambda checksums: seen.append(checksums) or [*other_nodes, checksums])
        assert data.load_sets(data.DEAD_LEAVES, data.DEAD_LEAVES, 0)[0] == leaves

    seen, leaves = [], dead_leaves("train", 2, 30)
    load(leaves)
    for other in (dead_leaves("train", 1, 30), dead_leaves("test", 2, 30)):  # fewer, and others of the same sizes
        with pytest.raises(CommandError, match=r"^dead-leaves: the nodes have different images; copy the images of one"):
            load(other, seen[0])
    load(leaves, seen[0])


FIVE = data.ImageSet("x", {name: Image.new("L", (1, 1), value) for value, name in enumerate("abcde")})


@pytest.mark.parametrize(("hold_out", "held_out"), [(2, "bd"), (3, "be"), (5, "c")])
def test_images_are_held_out_of_the_training_set(hold_out, held_out):
    training, test = FIVE.split(hold_out)
    assert training.images == {name: FIVE.images[name] for name in "abcde" if name not in held_out}
    assert test.images == {name: FIVE.images[name] for name in held_out}
    assert (training.name, test.name) == (f"x (without 1 of {hold_out})", f"x (1 of {hold_out})")


def test_neither_the_training_set_nor_the_held_out_one_is_empty():
    for hold_out in (1, 12):
        with pytest.raises(CommandError, match=f"^x: 5 images are too few to hold out 1 of {hold_out}$"):
            FIVE.split(hold_out)


def test_the_courses_lr_images_are_reproduced_to_the_last_bit(real_data):
    folder = real_data / "image_examples"  # which is no part of the published sets
    if not folder.is_dir():
        pytest.skip(f"needs the course's images in {folder}")
    for name in ("baby", "bird", "butterfly", "head", "woman"):
        hr, lr = (Image.open(folder / f"{name}_{kind}.bmp").convert("RGB") for kind in ("GT", "lr"))
        assert bicubic(hr, lr.size).tobytes() == lr.tobytes()


def test_a_test_set_holds_what_the_protocol_says(photos):
    test_set = data.TestSet(data.load_images(str(photos), "test"))
    assert (test_set.name, list(test_set.images)) == (photos.name, [f"leaves{i}" for i in range(1, 6)])
    lr, hr, up, figures = test_set.images["leaves5"]
    image = Image.open(photos / "leaves5.png").crop((0, 0, 99, 81))
    assert to_image(hr) == image
    assert lr == image.resize((33, 27), Image.Resampling.BICUBIC)
    assert to_image(up) == lr.resize((99, 81), Image.Resampling.BICUBIC)
    assert figures == psnr(up, hr)


def test_gray_images_are_measured_as_gray_and_trained_on_as_rgb():
    for folder, mode in (("gray", "L"), ("color", "RGB")):
        Path(folder).mkdir()
        random_image("L", (45, 36)).convert(mode).save(f"{folder}/a.png")
    gray, color = (data.TestSet(data.load_images(name, "test")).images["a"] for name in ("gray", "color"))
    assert (gray.lr.mode, gray.hr.shape, color.hr.shape) == ("L", (1, 36, 45), (3, 36, 45))
    assert gray.bicubic_psnr == psnr(gray.bicubic, gray.hr)
    a, b = (RandomPatches(data.load_images(name, "train"), 9, torch.device("cpu")) for name in ("gray", "color"))
    assert torch.equal(a.hr.pixels, b.hr.pixels)
    assert torch.equal(a.lr.pixels, b.lr.pixels)

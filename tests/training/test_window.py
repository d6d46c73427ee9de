"""Training sets larger than memory, on small images with a bound of a few hundred kilobytes."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line, file_of, in_new_process, load, random_image
from PIL import Image

from data import ImageSet, degrade, load_images
from imaging.dead_leaves import dead_leaves
from imaging.image_sets import ImageFiles, read_headers
from training import window
from training.grid_patches import GridPatches
from training.random_patches import RandomPatches, crop_of_tile
from training.window import DRAWS, PARTS, Tiles, Window
from utils import CommandError

CPU = torch.device("cpu")


def image_set(images):
    """Save images as PNG, and return the set of these files."""
    files = {name: Path(f"{name}.png") for name in images}
    for name, image in images.items():
        image.save(files[name], **image.info)
    headers, failures = read_headers(list(files.values()), 9)
    assert not failures
    return ImageSet("files", ImageFiles(files, headers, 9))


@pytest.fixture
def bound(monkeypatch):
    """Return a function that bounds the memory for training images, in bytes."""

    def set_bound(memory):
        monkeypatch.setattr(window, "MEMORY", memory)
        for patches in (RandomPatches, GridPatches):
            monkeypatch.setattr(patches, "MAX_PIXELS", 0)

    return set_bound


# ---------------------------------------------------------------------------------- tiles


def test_tiles_divide_the_places_for_patches_of_all_images():
    sizes = np.array([[9, 9], [100, 40], [33, 200], [150, 151]])
    tiles, found = Tiles(sizes, 4, 10), []
    for tile in map(tiles.__getitem__, range(len(tiles))):
        left, top, *_ = tile.box
        assert max(tile.places) <= 10
        rows, columns = (
            range(start // 3 + first, start // 3 + first + count)
            for start, first, count in zip((top, left), tile.first, tile.places, strict=True)
        )
        found += [(tile.image, row, column) for row in rows for column in columns]
    places = [(max(height // 3 - 3, 1), max(width // 3 - 3, 1)) for width, height in sizes.tolist()]
    expected = [(i, row, column) for i, (h, w) in enumerate(places) for row in range(h) for column in range(w)]
    assert sorted(found) == expected


def test_tile_has_the_lr_pixels_that_the_whole_image_has():
    """At each offset of their grid, and with the context of a patch, which no edge of a tile distorts."""
    image, size = random_image(size=(131, 87)), 5
    tiles = Tiles(np.array([image.size]), size, 11)
    assert len(tiles) > 8
    for tile, (y, x) in product(map(tiles.__getitem__, range(len(tiles))), product(range(3), repeat=2)):
        left, top, right, bottom = tile.box
        crop = crop_of_tile(tile, image.crop((left + x, top + y, right, bottom)), size)
        (lr,), whole = crop.lr, np.array(degrade(image.crop((x, y, *image.size)))[0])
        ends = [
            min(first + count + size + 3, side)
            for first, count, side in zip(crop.first, tile.places, lr.shape[:2], strict=True)
        ]
        rows, columns = (slice(max(first - 4, 0), end) for first, end in zip(crop.first, ends, strict=True))
        inside = whole[top // 3 :, left // 3 :][rows, columns]
        assert inside.size > 0
        assert np.array_equal(lr[rows, columns], inside)
        assert np.array_equal(crop.hr[:9, :9], np.array(image)[top + y : top + y + 9, left + x : left + x + 9])


def first_place(tile):
    """Return what distinguishes a tile: its image, and its first place for a patch in that."""
    return tile.image, tile.box[1] // 3 + tile.first[0], tile.box[0] // 3 + tile.first[1]


def test_tiles_of_all_sizes_have_the_same_chance(bound):
    bound(200_000)
    sizes = [(20, 20), (20, 120), (90, 20), (150, 130), (60, 60)]
    moving = Window(image_set({str(i): Image.new("L", size) for i, size in enumerate(sizes)}).images, 12, 0, 10)
    counts, offsets = dict.fromkeys((first_place(moving.tiles[i]) for i in range(len(moving.tiles))), 0), set()
    for tile in (tile for number in range(10_000) for tile in moving.draw(number)):
        counts[first_place(tile)] += 1
        offsets.add((tile.box[0] % 3, tile.box[1] % 3))
    assert len(offsets) == 9
    assert len(counts) == len(moving.tiles) > 10
    assert min(counts.values()) > 0.65 * max(counts.values())


def test_parts_depend_on_seed_and_number_alone(bound):
    bound(200_000)
    files = image_set({str(i): Image.new("L", (90, 80)) for i in range(4)}).images
    a, b, other = (Window(files, 12, seed, 10) for seed in (3, 3, 4))
    parts = [a.draw(number) for number in range(5)]
    assert [b.draw(number) for number in reversed(range(5))] == parts[::-1]
    assert parts[0] != parts[1]
    assert [other.draw(number) for number in range(5)] != parts


# --------------------------------------------------------------------------------- window


def numbers_by_step(moving, epochs, steps, pixels):
    """Return the numbers of the parts that are in memory at each step."""
    places, found = {}, []
    for epoch in epochs:
        original, moving.draw = moving.draw, lambda number: number
        moving.read = lambda number: number
        for count, changed in moving.turns(epoch * steps * pixels, steps, pixels, places.__setitem__):
            assert changed or found
            found += count * [sorted(places.values())]
        moving.draw = original
    return found


def test_window_depends_on_the_step_alone(bound):
    bound(200_000)
    files = image_set({"a": Image.new("L", (90, 80))}).images
    windows = [Window(files, 12, 0, 10) for _ in range(3)]
    pixels = windows[0].part_pixels * 3 // 5
    turns = [step * pixels // (DRAWS * windows[0].part_pixels) for step in range(60)]
    expected = [list(range(turn, turn + PARTS)) for turn in turns]
    assert turns[-1] == 5
    assert numbers_by_step(windows[0], [0], 60, pixels) == expected
    assert numbers_by_step(windows[1], range(6), 10, pixels) == expected
    assert numbers_by_step(windows[2], [4, 5], 10, pixels) == expected[40:]


def draw(images, patch, count, turns, kind=RandomPatches):
    """Return batches of a patch each, over so many turns of the window."""
    patches = kind(images, patch, CPU)
    steps = turns * -(-DRAWS * patches.window.part_pixels // (count * patch**2))
    return list(patches.batches(steps, count, torch.Generator().manual_seed(1)))


def test_images_count_by_their_areas(bound):
    """Of images of one color each place has the same chance. One is smaller than a patch, and one in several tiles."""
    bound(1_000_000)
    sizes = {20: (12, 9), 60: (60, 30), 100: (240, 150), 140: (60, 45), 180: (31, 92)}
    batches = draw(image_set({str(c): Image.new("RGB", size, (c,) * 3) for c, size in sizes.items()}), 12, 256, 200)
    colors = torch.cat([batch.hr[32:224, 0, 0, 0] for batch in batches])  # the others are in other colors
    weights = torch.cat([batch.weight[32:224] for batch in batches])
    areas = {color: width // 3 * (height // 3) for color, (width, height) in sizes.items()}
    assert set(colors.tolist()) == set(sizes)
    for color, area in areas.items():
        share = ((colors == color) * weights).sum() / weights.sum()
        assert share.item() == pytest.approx(area / sum(areas.values()), rel=0.1 if area > 500 else 0.35)


def test_patches_are_those_of_the_images(bound):
    """A gray image, one that is turned upright when it is read, and one that exceeds the bound."""
    bound(60_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = random_image(size=(60, 45), seed=2)
    turned.info["exif"] = exif
    images = {"gray": random_image("L", (50, 40)), "large": random_image(size=(120, 100), seed=1), "turned": turned}
    assert Window(image_set(images).images, 9, 0, 10).pixels < 120 * 100
    found = set()
    arrays = {name: np.array(image.convert("RGB")) for name, image in images.items()}
    for batch in draw(image_set(images), 9, 16, 30):
        for patch in batch.hr[2:6].permute(0, 2, 3, 1).numpy():
            for name, array in arrays.items():
                views = np.lib.stride_tricks.sliding_window_view(array, (9, 9), (0, 1))  # (rows, columns, 3, 9, 9)
                for turned_patch in (np.rot90(flipped, k) for flipped in (patch, patch[:, ::-1]) for k in range(4)):
                    rows, columns = np.nonzero((views[..., 0, 0] == turned_patch[0, 0]).all(2))
                    if any(
                        np.array_equal(array[y : y + 9, x : x + 9], turned_patch)
                        for y, x in zip(rows, columns, strict=True)
                    ):
                        found.add(name)
                        break
                else:
                    continue
                break
            else:
                pytest.fail("a patch is in no image")
    assert found == set(images)


def test_image_that_cannot_be_decoded_is_skipped_and_counted_once(bound, capfd):
    bound(250_000)
    images = {str(c): Image.new("RGB", (60, 60), (c, c, c)) for c in (10, 20, 30)}
    files = image_set(images)
    broken = file_of(random_image(size=(60, 60)), "PNG")
    Path("20.png").write_bytes(broken[: len(broken) // 2])
    batches = draw(files, 12, 16, 12)
    assert {int(x) for batch in batches for x in batch.hr[2:14, 0, 0, 0]} == {10, 30}
    assert_one_line(capfd.readouterr().err, "WARNING: 20.png", "training continues without it (1 of 3 images so far)")
    for name in ("10", "30"):
        Path(f"{name}.png").write_bytes(broken[:99])
    with pytest.raises(CommandError, match="files: no image can be decoded"):
        draw(files, 12, 16, 1)


def test_image_that_takes_too_much_memory_is_refused(bound):
    bound(100_000)
    files = image_set({"a": Image.new("RGB", (90, 90)), "b": Image.new("RGB", (160, 160))})
    with pytest.raises(CommandError, match=r"^b\.png: decoding it takes up to 0 MB, more than 0 MB; cut it "):
        RandomPatches(files, 12, CPU)


def test_each_patch_of_a_window_is_drawn_once_by_the_assignment(bound):
    bound(6_000_000)
    images = image_set({str(c): Image.new("RGB", (120, 90), (c, c, c)) for c in range(0, 250, 10)})
    patches, generator = GridPatches(images, 33, CPU), torch.Generator().manual_seed(2)
    assert len(next(patches.batches(1, 4, generator)).hr) == 4
    total = len(patches.hr)
    drawn = torch.cat([batch.hr for batch in patches.batches(1, total, generator)])[:, 0, 0, 0]
    assert torch.equal(drawn.bincount(minlength=250), patches.hr[:, 0, 0, 0].bincount(minlength=250))
    assert len(set(drawn.tolist())) > 5


# --------------------------------------------------------------------------- training runs


@pytest.mark.parametrize("recipe", ["default", "assignment"])
def test_resumed_run_has_the_same_window(train_small, bound, recipe):
    bound(300_000 if recipe == "default" else 6_000_000)
    options = (f"--recipe={recipe}", "--num-epoch=4", "--save-freq=2", "--epoch-size=0.03", "--patch-size=33")
    status, out, err = train_small(*options, "--output=a")
    assert (status, err) == (0, "")
    assert "\nthe set is too large for memory: patches come from " in out
    assert train_small("--output=b", command=("resume", "a/checkpoint.2"))[0] == 0
    a, b = (load(f"{folder}/checkpoint.4")["model"] for folder in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = load("a/checkpoint.2")["model"]
    assert not torch.equal(a["conv3.weight"], start["conv3.weight"])


def test_set_within_the_bound_is_in_memory_as_a_whole(photos):
    pixels = sum(image.width * image.height for image in load_images(str(photos), "train", 10**9).images.values())
    assert isinstance(load_images(str(photos), "train", pixels).images, dict)
    assert isinstance(load_images(str(photos), "train", pixels - 1).images, ImageFiles)


def peak_of_training(folder, memory):
    """Return the peak memory in MB that drawing patches takes."""
    window.MEMORY, RandomPatches.MAX_PIXELS = memory, 0
    torch.set_num_threads(1)
    before = peak()
    images = load_images(folder, "train", 0)
    patches = RandomPatches(images, 33, CPU)
    for _ in patches.batches(3 * DRAWS * patches.window.part_pixels // 33**2 // 64, 64, torch.Generator()):
        pass
    return len(images.images), peak() - before


def peak():
    """Return the peak memory of this process in MB."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1000


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_does_not_grow_with_the_set():
    """Forty megabytes of memory, and half a gigabyte of images. Tiles are prepared one at a time."""
    image = next(iter(dead_leaves("train", 1, 300).values())).resize((1200, 1000))
    Path("many").mkdir()
    image.save("many/0.bmp")
    for i in range(1, 150):
        os.link("many/0.bmp", f"many/{i}.bmp")
    Path("few").mkdir()
    for i in range(30):
        os.link("many/0.bmp", f"few/{i}.bmp")
    few, many = (in_new_process(peak_of_training, folder, 40_000_000) for folder in ("few", "many"))
    assert (few[0], many[0]) == (30, 150)
    assert many[1] < min(few[1] + 5, 90)

"""Training sets larger than memory, on small images with a bound of a few hundred kilobytes."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line, file_of, in_new_process, load, random_image
from PIL import Image

from data import ImageSet, degrade, load_images
from imaging import image_sets
from imaging.dead_leaves import dead_leaves
from imaging.image_sets import ImageFiles, read_headers
from model import SCALES, context_of
from training import patches, window
from training.grid_patches import GridPatches
from training.random_patches import RandomPatches, bicubic_error, crop_of_tile
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
        monkeypatch.setattr(patches, "MEMORY", 0)  # no set is in memory as a whole

    return set_bound


# ---------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("scale", SCALES)
def test_tiles_divide_the_places_for_patches_of_all_images(scale):
    sizes = np.array([[9, 9], [100, 40], [33, 200], [150, 151]]) * scale // 3
    tiles, found = Tiles(sizes, 4, 10, scale), []
    for tile in tiles:
        left, top, right, bottom = tile.box
        assert max(tile.positions) <= 10 or np.prod(tile.positions) <= 100
        rows, columns = (
            range(start // scale + first, start // scale + first + count)
            for start, first, count in zip((top, left), tile.first, tile.positions, strict=True)
        )
        found += [(tile.image, row, column) for row in rows for column in columns]
        assert 0 <= left < right <= sizes[tile.image, 0]
        assert 0 <= top < bottom <= sizes[tile.image, 1]
    positions = [(max(height // scale - 3, 1), max(width // scale - 3, 1)) for width, height in sizes.tolist()]
    expected = [(i, row, column) for i, (h, w) in enumerate(positions) for row in range(h) for column in range(w)]
    assert sorted(found) == expected
    boxes = [tile.box for tile in tiles]
    assert tiles.areas().tolist() == [(right - left) * (bottom - top) for left, top, right, bottom in boxes]


@pytest.mark.parametrize("scale", SCALES)
def test_tile_has_the_errors_of_its_places_in_the_whole_image(scale):
    image, size = random_image(size=(44 * scale - 1, 29 * scale)), 5
    for tile in Tiles(np.array([image.size]), size, 11, scale):
        left, top, *_ = tile.box
        crop, whole = crop_of_tile(tile, image.crop(tile.box), size, scale), bicubic_error(*degrade(image, scale))
        (row, column), (rows, columns) = crop.first, (count + size - 1 for count in tile.positions)
        row, column = row + top // scale, column + left // scale
        assert torch.equal(crop.error, whole[row : row + rows, column : column + columns])


@pytest.mark.parametrize("scale", SCALES)
def test_tile_has_the_lr_pixels_that_the_whole_image_has(scale):
    """At each offset of their grid, and with the context of a patch, which no edge of a tile distorts."""
    image, size, context = random_image(size=(44 * scale - 1, 29 * scale)), 5, context_of(scale)
    tiles = Tiles(np.array([image.size]), size, 11, scale)
    assert len(tiles) > 8
    for tile, (y, x) in product(tiles, product(range(scale), repeat=2)):
        left, top, right, bottom = tile.box
        crop = crop_of_tile(tile, image.crop((left + x, top + y, right, bottom)), size, scale)
        (lr,), whole = crop.lr, np.array(degrade(image.crop((x, y, *image.size)), scale)[0])
        ends = [
            min(first + count + size - 1 + context, side)
            for first, count, side in zip(crop.first, tile.positions, lr.shape[:2], strict=True)
        ]
        rows, columns = (slice(max(first - context, 0), end) for first, end in zip(crop.first, ends, strict=True))
        inside = whole[top // scale :, left // scale :][rows, columns]
        assert inside.size > 0
        assert np.array_equal(lr[rows, columns], inside)
        assert np.array_equal(crop.hr[:9, :9], np.array(image)[top + y : top + y + 9, left + x : left + x + 9])


def first_place(tile):
    """Return what distinguishes a tile: its image, and its first position for a patch in that."""
    return tile.image, tile.box[1] // 3 + tile.first[0], tile.box[0] // 3 + tile.first[1]


def test_each_tile_comes_once_before_any_comes_again(bound):
    bound(200_000)
    sizes = [(20, 20), (20, 120), (90, 20), (150, 130), (60, 60)]
    moving = Window(image_set({str(i): Image.new("L", size) for i, size in enumerate(sizes)}).images, 12, 3, 0, 10)
    tiles = [tile for number in range(2500) for tile in moving.draw(number)]
    everything, count = sorted(map(first_place, moving.tiles)), len(moving.tiles)
    assert count > 10
    orders = [list(map(first_place, tiles[start : start + count])) for start in range(0, len(tiles) - count, count)]
    assert len(orders) > 20
    assert all(sorted(order) == everything for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    assert len({(tile.box[0] % 3, tile.box[1] % 3) for tile in tiles}) == 9


def test_parts_depend_on_seed_and_number_alone(bound):
    bound(200_000)
    files = image_set({str(i): Image.new("L", (90, 80)) for i in range(4)}).images
    a, b, other = (Window(files, 12, 3, seed, 10) for seed in (3, 3, 4))
    parts = [a.draw(number) for number in range(5)]
    assert [b.draw(number) for number in reversed(range(5))] == parts[::-1]
    assert parts[0] != parts[1]
    assert [other.draw(number) for number in range(5)] != parts


# --------------------------------------------------------------------------------- window


def numbers_by_step(moving, epochs, steps, pixels):
    """Return the numbers of the parts that are in memory at each step."""
    slots, found = {}, []
    for epoch in epochs:
        for count, new in moving.turns(epoch * steps * pixels, steps, pixels):
            slots |= new
            found += count * [sorted(slots.values())]
    return found


def test_window_depends_on_the_pixels_drawn_alone(bound):
    bound(200_000)
    files = image_set({"a": Image.new("L", (90, 80))}).images
    windows = [Window(files, 12, 3, 0, 10) for _ in range(3)]
    pixels = windows[0].part_pixels * 3 // 5
    turns = [step * pixels // (DRAWS * windows[0].part_pixels) for step in range(60)]
    expected = [list(range(turn, turn + PARTS)) for turn in turns]
    assert turns[-1] == 5
    assert numbers_by_step(windows[0], [0], 60, pixels) == expected
    assert numbers_by_step(windows[1], range(6), 10, pixels) == expected
    assert numbers_by_step(windows[2], [4, 5], 10, pixels) == expected[40:]


def draw(images, patch, count, turns, kind=RandomPatches):
    """Return batches of a patch each, over so many turns of the window."""
    patches = kind(images, patch, 3, CPU)
    steps = turns * -(-DRAWS * patches.window.part_pixels // (count * patch**2))
    return list(patches.batches(steps, count, torch.Generator().manual_seed(1)))


def test_each_place_in_an_image_of_several_tiles_has_the_same_chance(bound):
    """Red is the column and green the row, so that the minima of a patch are its top left corner."""
    bound(200_000)
    rows, columns = np.mgrid[:90, :120].astype(np.uint8)
    images = image_set({"a": Image.fromarray(np.dstack([columns, rows, 0 * rows]))})
    assert len(RandomPatches(images, 12, 3, CPU).window.tiles) > 4
    batches = draw(images, 12, 256, 100)
    left, top = (torch.cat([batch.hr[96:224, c].amin((1, 2)) for batch in batches]) // 3 for c in (0, 1))
    weights = torch.cat([batch.weight[96:224] for batch in batches])
    for found, count in ((left, 40 - 3), (top, 30 - 3)):
        shares = found.int().bincount(weights, minlength=count) / weights.sum() * count
        assert len(shares) == count
        assert shares[:-1].sub(1).abs().max() < 0.5  # the last position exists at one offset of three


def test_images_count_by_their_areas(bound):
    """Each position in images of one color is equally likely. One is smaller than a patch, and one in several tiles."""
    bound(1_000_000)
    sizes = {20: (12, 9), 60: (60, 30), 100: (240, 150), 140: (60, 45), 180: (31, 92)}
    batches = draw(image_set({str(c): Image.new("RGB", size, (c,) * 3) for c, size in sizes.items()}), 12, 256, 200)
    colors = torch.cat([batch.hr[96:224, 0, 0, 0] for batch in batches])  # the others are in other colors
    weights = torch.cat([batch.weight[96:224] for batch in batches])
    areas = {color: width // 3 * (height // 3) for color, (width, height) in sizes.items()}
    assert set(colors.tolist()) == set(sizes)
    for color, area in areas.items():
        share = ((colors == color) * weights).sum() / weights.sum()
        assert share.item() == pytest.approx(area / sum(areas.values()), rel=0.1 if area > 500 else 0.35)


def test_tiles_of_images_of_all_kinds_are_read(bound):
    """A gray image, one that is turned upright when it is decoded, and one that exceeds the bound."""
    bound(300_000)
    turned, exif = random_image(size=(60, 45), seed=2), Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif
    images = {"gray": random_image("L", (50, 40)), "large": random_image(size=(210, 180), seed=1), "turned": turned}
    moving = Window(image_set(images).images, 9, 3, 0, 14)
    assert moving.pixels < 210 * 180
    images["turned"] = turned.transpose(Image.Transpose.ROTATE_270).transpose(Image.Transpose.TRANSPOSE)
    tiles = list(moving.read(list(moving.tiles)))
    assert len(tiles) == len(moving.tiles) > 20
    for tile, pixels in tiles:
        assert pixels.tobytes() == list(images.values())[tile.image].convert("RGB").crop(tile.box).tobytes()


def test_image_that_cannot_be_decoded_is_skipped_and_counted_once(bound, capfd):
    bound(250_000)
    images = {str(c): Image.new("RGB", (60, 60), (c, c, c)) for c in (10, 20, 30)}
    files = image_set(images)
    broken = file_of(random_image(size=(60, 60)), "PNG")
    Path("20.png").write_bytes(broken[: len(broken) // 2])
    batches = draw(files, 12, 16, 12)
    assert {int(x) for batch in batches for x in batch.hr[6:14, 0, 0, 0]} == {10, 30}
    assert_one_line(capfd.readouterr().err, "WARNING: 20.png", "training continues without it (1 of 3 images so far)")
    for name in ("10", "30"):
        Path(f"{name}.png").write_bytes(broken[:99])
    with pytest.raises(CommandError, match="files: no image can be decoded"):
        draw(files, 12, 16, 1)


def test_image_that_takes_too_much_memory_is_refused(bound):
    bound(1_500_000)
    files = image_set({"a": Image.new("RGB", (90, 90)), "b": Image.new("RGB", (800, 600))})
    with pytest.raises(
        CommandError, match=r"^b\.png: decoding it needs up to 2 MB, and the limit is 2 MB; convert it "
    ):
        RandomPatches(files, 12, 3, CPU)


def test_image_that_has_changed_its_size_is_skipped(bound, capfd):
    bound(250_000)
    images = image_set({name: random_image(size=(60, 60)) for name in "ab"})
    random_image(size=(60, 57)).save("b.png")
    draw(images, 12, 16, 12)
    assert_one_line(capfd.readouterr().err, "WARNING: b.png: its size has changed, or does not match its header")


def test_each_image_of_a_part_is_decoded_once(bound, monkeypatch):
    bound(1_000_000)
    decoded, read = [], image_sets.read_hr
    images = image_set({name: random_image(size=(200, 200)) for name in "ab"})
    moving = Window(images.images, 12, 3, 0, 10)
    monkeypatch.setattr(image_sets, "read_hr", lambda path, *a, **b: decoded.append(path.name) or read(path, *a, **b))
    tiles = [moving.tiles[i] for i in np.random.default_rng(0).permutation(len(moving.tiles))]
    assert len(list(moving.read(tiles))) == len(tiles) > 2
    assert decoded == ["a.png", "b.png"]


def test_processes_must_decode_the_same_images(bound, monkeypatch):
    bound(250_000)
    images = image_set({name: random_image(size=(60, 60)) for name in "ab"})
    monkeypatch.setattr(patches, "all_gather", lambda failed: [failed, {1}])
    with pytest.raises(CommandError, match=r"^files: not all processes can decode the same images"):
        draw(images, 12, 16, 1)


def test_each_patch_of_a_window_is_drawn_once_by_the_assignment(bound):
    bound(6_000_000)
    images = image_set({str(c): Image.new("RGB", (120, 90), (c, c, c)) for c in range(0, 250, 10)})
    patches, generator = GridPatches(images, 33, 3, CPU), torch.Generator().manual_seed(2)
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
    assert "\nthe training set does not fit into the memory for it: patches are drawn from 0.0" in out
    assert train_small("--output=b", command=("resume", "a/checkpoint.2"))[0] == 0
    a, b = (load(f"{folder}/checkpoint.4")["model"] for folder in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = load("a/checkpoint.2")["model"]
    assert not torch.equal(a["conv3.weight"], start["conv3.weight"])


@pytest.mark.parametrize(("recipe", "memory"), [("default", 300_000), ("assignment", 6_000_000)])
def test_window_moves_from_epoch_to_epoch(train_small, bound, monkeypatch, recipe, memory):
    """Each part is read once, in order, and drawn with the seed of the run."""
    bound(memory)
    numbers, draw = [], Window.draw
    monkeypatch.setattr(Window, "draw", lambda self, n: numbers.append((self.seed, n)) or draw(self, n))
    assert train_small(f"--recipe={recipe}", "--num-epoch=6", "--patch-size=33", "--seed=5")[0] == 0
    assert len(numbers) > PARTS
    assert numbers == [(5, n) for n in range(len(numbers))]


def test_set_within_the_bound_is_in_memory_as_a_whole(photos):
    """The largest image counts four times, and each as 300 pixels more."""
    pixels = sum(image.width * image.height for image in load_images(str(photos), "train").images.values())
    pixels += 3 * 120 * 75 + 5 * 300
    assert isinstance(load_images(str(photos), "train", pixels).images, dict)
    assert isinstance(load_images(str(photos), "train", pixels - 1).images, ImageFiles)


def test_docs_have_the_sizes_of_sets_in_memory():
    two, three, four = (RandomPatches.max_pixels(24 + 3 * scale, scale) // 10**6 for scale in SCALES)
    grid = GridPatches.max_pixels(33, 3) // 10**6
    sizes = f"up to {three} megapixels ({two} at ×2, {four} at ×4, {grid} with `--recipe=assignment`) is kept in memory"  # noqa: RUF001
    assert sizes in " ".join((ROOT / "docs" / "training.md").read_text("utf-8").split())


def peak_of_training(folder, memory):
    """Return the peak memory in MB that drawing patches takes."""
    window.MEMORY = memory
    torch.set_num_threads(1)
    before = peak()
    images = load_images(folder, "train", 0)
    patches = RandomPatches(images, 33, 3, CPU)
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

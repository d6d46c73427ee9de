import contextlib
import hashlib
import http.server
import io
import os
import threading
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import assert_one_line
from PIL import Image

import data
import utils
from utils import Failure

CPU = torch.device("cpu")

# --------------------------------------------------------------------- folders of images


def test_the_courses_lr_images_are_reproduced_to_the_last_bit(image_examples):
    for name in ("baby", "bird", "butterfly", "head", "woman"):
        hr, lr = (Image.open(image_examples / f"{name}_{kind}.bmp").convert("RGB") for kind in ("GT", "lr"))
        assert np.array_equal(data.bicubic(hr, *lr.size), lr)
        if hr.width % 3 == hr.height % 3 == 0:
            assert np.array_equal(data.degrade(hr)[0], lr)


def test_the_published_sets_are_known_by_their_content(real_data, tmp_path):
    assert data.load_images(real_data / "91-image", "train")[0] == "91-image"
    renamed = tmp_path / "elsewhere"
    renamed.mkdir()
    for file in (real_data / "Set5").iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    (renamed / "._baby_GT.bmp").write_text("what macOS leaves behind is not read")
    assert data.load_test_set(renamed).name == "Set5"
    Image.new("RGB", (9, 9)).save(renamed / "extra.png")
    assert data.load_test_set(renamed).name == "elsewhere"


def test_nothing_else_is_called_by_a_published_name(photos, tmp_path):
    assert data.load_test_set(photos).name == photos.name
    for name in ("Set5", "set-5", "91-image"):
        fake = tmp_path / name
        fake.mkdir()
        Image.new("RGB", (9, 9)).save(fake / "baby_GT.bmp")
        assert data.load_test_set(fake).name == f"{name} (not the published set)"


def test_degrade_crops_to_a_multiple_of_three_at_the_right_and_bottom():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 35, 3), dtype=np.uint8))
    lr, hr = data.degrade(image)
    assert (lr.size, hr.size) == ((11, 10), (33, 30))
    assert np.array_equal(hr, np.asarray(image)[:30, :33])
    assert np.array_equal(lr, hr.resize((11, 10), Image.Resampling.BICUBIC))


def test_a_test_set_holds_what_the_protocol_says(photos):
    test_set = data.load_test_set(photos)
    assert [i.name for i in test_set.images] == ["leaves1", "leaves2", "leaves3", "leaves4", "leaves5"]
    _name, lr, hr, up, psnr = test_set.images[4]
    image = Image.open(photos / "leaves5.png").crop((0, 0, 99, 81))
    assert np.array_equal(data.to_image(hr), image)
    assert np.array_equal(data.to_image(lr), image.resize((33, 27), Image.Resampling.BICUBIC))
    assert np.array_equal(data.to_image(up), data.to_image(lr).resize((99, 81), Image.Resampling.BICUBIC))
    assert psnr == {"bicubic_y": utils.psnr_y(up, hr), "bicubic_rgb": utils.psnr_rgb(up, hr)}


def test_images_are_held_out_of_the_training_set(photos, tmp_path):
    name, held_out = data.load_images(photos, "test", 2)
    assert name == f"{photos.name} (1 of 2)"
    assert [name for name, _ in held_out] == ["leaves2", "leaves4"]
    name, others = data.load_images(photos, "train", 2)
    assert name == f"{photos.name} (without 1 of 2)"
    assert [name for name, _ in others] == ["leaves1", "leaves3", "leaves5"]
    assert [i.name for i in data.load_test_set(photos, 3).images] == ["leaves2", "leaves5"]
    assert data.TrainSet(photos, 9, CPU, 3).count == 3
    assert data.TrainSet(photos, 9, CPU, 3).pixels == 96 * 90 + 30 * 39 + 63 * 63
    with pytest.raises(utils.Failure, match="with 1 of 1 images held out none is left for training"):
        data.load_images(photos, "train", 1)
    with pytest.raises(utils.Failure, match="none is left for testing"):
        data.load_images(photos, "test", 12)


def test_any_image_that_pillow_reads_will_do(tmp_path):
    grey = Image.linear_gradient("L").crop((0, 0, 30, 60))
    grey.save(tmp_path / "a.tiff")
    grey.convert("P").save(tmp_path / "b.gif")
    grey.save(tmp_path / "b.jpg")
    grey.convert("RGBA").save(tmp_path / "c.png")
    grey.save(tmp_path / "c_GT.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "d.png")
    grey.convert("P").save(tmp_path / "e.png", transparency=bytes(range(256)))
    (tmp_path / ".hidden").write_text("no image")
    (tmp_path / "folder").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of Pillow's may reach the user
        _name, images = data.load_images(tmp_path, "train")
    assert [n for n, _ in images] == ["a.tiff", "b.gif", "b.jpg", "c.png", "c_GT.png", "d.png", "e.png"]  # all in full
    assert {(i.mode, i.size) for _, i in images} == {("RGB", (30, 60))}
    for i in (0, 3, 4, 5, 6):
        value = round(50 * 50 / 255 + 205) if i == 6 else 50  # what is nearly transparent is seen on white
        assert np.asarray(images[i][1])[50].tolist() == [[value] * 3] * 30, images[i]


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(Failure, match="nowhere: no such folder"):
        data.load_images("nowhere", "train")
    with pytest.raises(Failure, match="no such folder"):
        data.load_images("", "train")
    with pytest.raises(Failure, match="no images"):
        data.load_images(tmp_path, "train")
    Image.new("RGB", (8, 20)).save(tmp_path / "a.png")
    with pytest.raises(Failure, match=r"a\.png: 8x20 pixels are too few"):
        data.load_images(tmp_path, "train")
    (tmp_path / "a.png").write_text("some text")
    with pytest.raises(Failure, match=r"a\.png: not an image"):
        data.load_images(tmp_path, "train")
    Image.new("F", (20, 20)).save(tmp_path / "a.tiff")
    (tmp_path / "a.png").unlink()
    with pytest.raises(Failure, match=r"a\.tiff: .*32 bits"):
        data.load_images(tmp_path, "train")
    (tmp_path / "a.tiff").unlink()
    Image.effect_noise((60, 60), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with pytest.raises(Failure, match=r"a\.png: not an image that can be read: .*truncated"):
        data.load_images(tmp_path, "train")


# ------------------------------------------------------------------------------- patches


def dihedral(tensor):
    """The eight flips and rotations of (..., h, w)."""
    return [t.flip(dims) for t in (tensor, tensor.transpose(-1, -2)) for dims in ((), (-1,), (-2,), (-1, -2))]


@pytest.fixture
def mapped(tmp_path):
    """Two images whose pixels tell their own place: red = column, green = row, blue = image."""
    folder = tmp_path / "mapped"
    folder.mkdir()
    for blue, (width, height) in enumerate([(60, 45), (33, 90)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(width), np.arange(height)[:, None], blue * 100
        Image.fromarray(pixels).save(folder / f"{blue}.png")
    return folder


def draw(folder, patch, count, seed, steps=1):
    batches = list(data.TrainSet(folder, patch, CPU).batches(steps, count, torch.Generator().manual_seed(seed)))
    assert len(batches) == steps
    return (torch.cat(side) for side in zip(*batches, strict=True))


def test_patches_are_oriented_crops_and_lr_fits_hr(mapped):
    lr, hr = draw(mapped, 12, 200, seed=1, steps=2)
    assert lr.shape == (400, 3, 12, 12)  # 4 and 4 pixels of context to each side
    assert hr.shape == (400, 3, 12, 12)
    orientations, corners = set(), {0: set(), 100: set()}
    images = {k * 100: data.open_image(mapped / f"{k}.png") for k in (0, 1)}
    for lr_patch, hr_patch in zip(lr.long(), hr.long(), strict=True):
        blue = hr_patch[2, 0, 0].item()
        left, top = hr_patch[0].min().item(), hr_patch[1].min().item()
        grid_y, grid_x = torch.meshgrid(torch.arange(top, top + 12), torch.arange(left, left + 12), indexing="ij")
        expected = torch.stack([grid_x, grid_y, torch.full_like(grid_x, blue)])
        matches = [k for k, patch in enumerate(dihedral(expected)) if torch.equal(patch, hr_patch)]
        assert len(matches) == 1
        orientations.add(matches[0])
        corners[blue].add((top, left))
        # The LR patch: the same place in the LR image with 4 pixels around, edges replicated.
        whole = images[blue]  # less the rows and columns before the LR image's grid begins
        part = whole.crop((left % 3, top % 3, whole.width, whole.height))
        image = data.to_tensor(data.degrade(part)[0]).long()
        y = torch.arange(top // 3 - 4, top // 3 + 8).clamp(0, part.height // 3 - 1)
        x = torch.arange(left // 3 - 4, left // 3 + 8).clamp(0, part.width // 3 - 1)
        assert torch.equal(lr_patch, dihedral(image[:, y][..., x])[matches[0]])
    assert orientations == set(range(8))
    for blue, image in images.items():  # all over the image, to all its edges, at all nine phases
        assert len(corners[blue]) > 120
        tops, lefts = zip(*corners[blue], strict=True)
        assert (min(tops), max(tops)) == (0, image.height - 12)
        assert (min(lefts), max(lefts)) == (0, image.width - 12)
        assert len({(top % 3, left % 3) for top, left in corners[blue]}) == 9


def test_large_images_are_drawn_from_more_often(mapped):
    _, hr = draw(mapped, 3, 4000, seed=2)
    share = (hr[:, 2, 0, 0] > 0).double().mean().item()
    assert share == pytest.approx(33 * 90 / (33 * 90 + 60 * 45), abs=0.03)


def test_an_image_smaller_than_a_patch_is_used_whole(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    lr, hr = draw(tmp_path, 15, 8, seed=0)
    padded = torch.from_numpy(np.pad(pixels, ((0, 8), (0, 5), (0, 0)), mode="edge")).permute(2, 0, 1)
    lrs, hrs = [], []
    for top in range(3):
        for left in range(3):
            small = data.to_tensor(data.degrade(Image.fromarray(pixels[top:, left:]))[0]).numpy()
            pad = ((0, 0), (4, 9 - small.shape[1]), (4, 9 - small.shape[2]))
            lrs += dihedral(torch.from_numpy(np.pad(small, pad, mode="edge")))
            hrs += dihedral(padded[:, top : top + 15, left : left + 15])
    for lr_patch, patch in zip(lr, hr, strict=True):
        assert any(torch.equal(lr_patch, a) and torch.equal(patch, b) for a, b in zip(lrs, hrs, strict=True))


def test_the_same_generator_draws_the_same(mapped):
    (lr, hr), (lr_again, hr_again) = (draw(mapped, 9, 5, seed=5) for _ in range(2))
    assert torch.equal(lr, lr_again)
    assert torch.equal(hr, hr_again)


# --------------------------------------------------------------------- generated images


def test_dead_leaves_are_the_same_each_time_and_held_out():
    train, again, test = (data.dead_leaves(role, 3, 60) for role in ("train", "train", "test"))
    assert [i.size for _, i in train] == [(60, 60)] * 3
    pixels = [[np.asarray(i).tobytes() for _, i in images] for images in (train, again, test)]
    assert pixels[0] == pixels[1]
    assert len(set(pixels[0] + pixels[2])) == 6


def test_dead_leaves_have_the_spectrum_of_natural_images():
    """Power falls with frequency as f^-a with a near 2; white noise has 0, a smooth ramp above 3."""
    slopes = []
    for _, image in data.dead_leaves("train", 4):
        grey = np.asarray(image.convert("L")).astype(float)
        grey = (grey - grey.mean()) * np.hanning(len(grey))[:, None] * np.hanning(len(grey))
        power = abs(np.fft.fftshift(np.fft.fft2(grey))) ** 2
        y, x = np.indices(power.shape) - len(grey) // 2
        radius = np.hypot(x, y).astype(int)
        profile = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
        f = np.arange(4, 80)
        slopes.append(-np.polyfit(np.log(f), np.log(profile[f]), 1)[0])
    assert 1.5 < np.mean(slopes) < 3, slopes


# ------------------------------------------------------------------------------- fetching


@pytest.fixture
def tiny_sets(monkeypatch):
    """Two made-up sets in place of the published ones; returns their files."""
    rng = np.random.default_rng(0)
    files = {}
    for name, count in (("91-image", 3), ("Set5", 2)):
        files[name] = {}
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "BMP")
            files[name][f"t{i}.bmp"] = buffer.getvalue()
    known = {}
    for name, content in files.items():  # the digest as `sha256sum *.bmp | sha256sum` has it
        lines = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in sorted(content.items()))
        known[name] = hashlib.sha256(lines.encode()).hexdigest()
    monkeypatch.setattr(data, "SETS", known)
    return files


def archive(files, evil=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for folder, name in (("repo-1/Train/", "91-image"), ("repo-1/Test/Set5/", "Set5")):
            for file, content in files[name].items():
                zipped.writestr(folder + file, content)
        zipped.writestr("repo-1/Test/other.bmp", b"BM another image")
        zipped.writestr("repo-1/README.md", "hello")
        if evil:
            zipped.writestr(evil, b"BM gotcha", zipfile.ZIP_STORED)
    return buffer.getvalue()


@pytest.fixture
def web(tiny_sets):
    """A server on the loopback; web(path) gives the address of a good or a misbehaving download."""
    good = archive(tiny_sets)
    spoilt = {n: dict(f) for n, f in tiny_sets.items()}
    spoilt["Set5"]["t1.bmp"] = spoilt["Set5"]["t1.bmp"][:-1] + b"x"
    bodies = {
        "good": good,
        "cut": good[: len(good) // 2],
        "garbage": b"<html>Please log in</html>",
        "corrupted": archive(spoilt),
        "bit-flip": good[:200] + bytes([good[200] ^ 1]) + good[201:],
        "evil": archive(tiny_sets, "repo-1/../../../evil.bmp"),
        "absolute": archive(tiny_sets, "/tmp/evil.bmp"),
        "evil-and-damaged": archive(tiny_sets, "../evil.bmp").replace(b"BM gotcha", b"BM changed"),
    }

    redirects = {"loop": "/loop", "elsewhere": "/corrupted", "to-a-file": f"file://{__file__}"}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.strip("/")
            if name == "endless":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(2**16))
            elif name == "stall":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                stalled.wait(20)
            elif name in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[name])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif name in bodies:
                self.send_response(200)
                self.send_header("Content-Length", str(len(good if name == "cut" else bodies[name])))
                self.end_headers()
                self.wfile.write(bodies[name])
            else:
                self.send_error(404)
            self.close_connection = True

        def log_message(self, *args):
            pass

    stalled = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda name: f"http://127.0.0.1:{server.server_address[1]}/{name}"
    stalled.set()
    server.shutdown()
    server.server_close()


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_good_download_puts_both_sets_in_place(web, tiny_sets, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MIRRORS", (web("good"),))
    status, out, err = cli("data.py")
    assert status == 0, err
    assert contents(tmp_path / "data" / "91-image") == tiny_sets["91-image"]
    assert contents(tmp_path / "data" / "Set5") == tiny_sets["Set5"]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["91-image", "Set5"]
    assert "as published" in out
    monkeypatch.setattr(data, "MIRRORS", ())  # once is enough
    status, out, err = cli("data.py")
    assert status == 0
    assert "there already" in out


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("cut", "cut off after"),
        ("garbage", "not a whole zip archive"),
        ("corrupted", "no folder in it holds Set5 as published"),
        ("bit-flip", "not a whole zip archive"),
        ("evil", "leads outside"),
        ("absolute", "leads outside"),
        ("evil-and-damaged", "leads outside"),  # found before anything is unpacked
        ("missing", "Not Found"),
        ("endless", "larger than 1 MiB"),
        ("stall", "timed out"),
        ("loop", "infinite loop"),
        ("elsewhere", "no folder in it holds Set5 as published"),
        ("to-a-file", "not allowed"),
    ],
)
def test_a_bad_download_leaves_nothing_and_the_next_mirror_serves(web, cli, monkeypatch, tmp_path, path, reason):
    monkeypatch.setattr(data, "MAX_BYTES", 2**20)
    monkeypatch.setattr(data, "TIMEOUT", 1)
    monkeypatch.setattr(data, "MIRRORS", (web(path),))
    status, _out, err = cli("data.py")
    assert status == 1
    assert_one_line(err, "127.0.0.1", reason)
    assert not list(tmp_path.rglob("*.bmp"))
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())
    monkeypatch.setattr(data, "MIRRORS", (web(path), web("good")))
    assert cli("data.py")[0] == 0
    assert (tmp_path / "data" / "Set5" / "t1.bmp").exists()


def test_a_slow_or_inflated_archive_is_refused(web, tiny_sets, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MIRRORS", (web("endless"),))
    monkeypatch.setattr(data, "DEADLINE", 0)
    status, _, err = cli("data.py")
    assert status == 1
    assert_one_line(err, "not done after 0 seconds")
    zeros = {"91-image": {"bomb.bmp": bytes(2**22)}, "Set5": {}}
    (tmp_path / "bomb.zip").write_bytes(archive(zeros))
    assert (tmp_path / "bomb.zip").stat().st_size < 2**16
    monkeypatch.setattr(data, "MAX_BYTES", 2**21)
    status, _, err = cli("data.py", "--from", "bomb.zip")
    assert status == 1
    assert_one_line(err, "unpacks to more than 2 MiB")


def test_a_fault_of_this_machine_is_not_the_mirrors(web, cli, monkeypatch, tmp_path):
    (tmp_path / "data").write_text("in the way")
    monkeypatch.setattr(data, "MIRRORS", (web("good"), web("missing")))
    status, _, err = cli("data.py")
    assert status == 1
    assert_one_line(err, "cannot write data/91-image: File exists")


def test_an_unreachable_server_is_an_error(tiny_sets, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/x.zip",))  # nobody listens there
    status, _, err = cli("data.py")
    assert status == 1
    assert_one_line(err, "127.0.0.1:9: ", "refused")
    assert not (tmp_path / "data").exists()


def test_a_set_that_is_there_is_kept(web, tiny_sets, cli, monkeypatch, tmp_path):
    mine = tmp_path / "data" / "Set5"
    mine.mkdir(parents=True)
    (mine / "mine.png").write_text("mine")
    monkeypatch.setattr(data, "MIRRORS", (web("good"),))
    assert cli("data.py")[0] == 0
    assert contents(mine) == {"mine.png": b"mine"}
    assert contents(tmp_path / "data" / "91-image") == tiny_sets["91-image"]


def test_local_copies_are_taken_with_the_same_checks(tiny_sets, cli, tmp_path):
    copy = tmp_path / "copy"
    for name, files in tiny_sets.items():
        (copy / "deep" / name).mkdir(parents=True)
        for file, content in files.items():
            (copy / "deep" / name / file).write_bytes(content)
    (tmp_path / "copy.zip").write_bytes(archive(tiny_sets))
    for source in (copy, tmp_path / "copy.zip"):
        assert cli("data.py", "--from", source)[0] == 0
        for name in tiny_sets:
            assert contents(tmp_path / "data" / name) == tiny_sets[name]
            for file in (tmp_path / "data" / name).iterdir():
                file.unlink()
            (tmp_path / "data" / name).rmdir()
    (copy / "deep" / "Set5" / "t0.bmp").write_bytes(b"BM something else")
    status, _, err = cli("data.py", "--from", copy)
    assert status == 1
    assert_one_line(err, copy, "Set5 as published")
    assert not list((tmp_path / "data").iterdir())
    os.mkfifo("pipe.zip")  # which would be waited for
    for source in ("nowhere.zip", "pipe.zip"):
        status, _, err = cli("data.py", "--from", source)
        assert status == 1
        assert_one_line(err, f"{source}: no such archive or folder")


def test_the_real_sets_pass_from_a_local_copy(real_data, cli, tmp_path):
    assert cli("data.py", "--from", real_data)[0] == 0
    assert len(list((tmp_path / "data" / "91-image").iterdir())) == 91
    assert contents(tmp_path / "data" / "Set5") == contents(real_data / "Set5")

"""--cuda on an emulated GPU: same results as on the CPU, no tensor on the wrong device, no step that waits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_cuda import CUDA, emulated, waits
from helpers import load, random_image, same
from PIL import Image

from data import ImageSet, load_images
from imaging.dead_leaves import dead_leaves
from train import RECIPES, train_one_epoch
from training import window
from training.grid_patches import GridPatches
from training.options import Options
from training.random_patches import RandomPatches
from training.run import new_run
from training.window import DRAWS
from upscaling import distributed


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Return a folder with two images, the training and test set."""
    folder = tmp_path_factory.mktemp("leaves")
    for name, image in dead_leaves("train", 2, 36).items():
        image.save(folder / f"{name}.png")
    return folder


def test_training_gives_same_weights_as_on_cpu_and_resumes_on_either_device(cli, leaves):
    """In fp32 they are the same to the last bit."""

    def train(*args):
        status, out, err = cli("train.py", *args)
        assert (status, err) == (0, "")
        return out

    options = ["--precision=fp32", "--num-epoch=2", "--save-freq=1", "--batch-size=4", "--patch-size=24"]
    options += [f"--train-data={leaves}", f"--test-data={leaves}"]
    assert "on cpu" in train("train", *options, "--output=cpu")
    torch.backends.cudnn.benchmark = False
    with emulated():
        assert "on cuda" in train("train", *options, "--cuda", "--output=gpu")
        assert torch.backends.cudnn.benchmark
        assert "on cuda" in train("resume", "cpu/checkpoint.1", "--cuda", "--output=cpu-gpu")
    assert "on cpu" in train("resume", "gpu/checkpoint.1", "--output=gpu-cpu")
    for folder in ("gpu", "cpu-gpu", "gpu-cpu"):
        assert same(load(f"{folder}/checkpoint.2")["model"], load("cpu/checkpoint.2")["model"]), folder


@pytest.mark.parametrize(("kind", "memory"), [(RandomPatches, 300_000), (GridPatches, 6_000_000)])
def test_window_on_gpu_has_the_patches_of_the_cpu(photos, monkeypatch, kind, memory):
    monkeypatch.setattr(window, "MEMORY", memory)
    images = load_images(str(photos), "train", 0)

    def draw(device):
        patches = kind(images, 33, 3, device)
        steps = 3 * DRAWS * patches.window.part_pixels // (4 * 33**2)
        batches = list(patches.batches(steps, 4, torch.Generator().manual_seed(1)))
        assert {x.device.type for batch in batches for x in batch} == {device.type}
        return [torch.cat([x.cpu() for x in xs]) for xs in zip(*batches, strict=True)]

    expected = draw(torch.device("cpu"))
    with emulated():
        assert all(torch.equal(a, b) for a, b in zip(draw(CUDA), expected, strict=True))


def test_training_steps_do_not_wait_for_gpu():
    with emulated():
        train_set = RandomPatches(ImageSet("leaves", dead_leaves("train", 1, 36)), 18, 3, CUDA)
        run = new_run(Options(patch_size=18, batch_size=1, num_epoch=2), RECIPES["default"], train_set, torch.float32)
        train_one_epoch(run, train_set, 1, lambda: None)  # this also copies the constants
        waits.clear()
        losses = train_one_epoch(run, train_set, 2, lambda: None)  # its last step is in the last tenth
        assert len(losses) == 4
        assert waits == ["to the GPU"] * 4  # positions, flips, weights and factors of the whole epoch's patches


def test_gradients_are_reduced_on_cpu_in_one_call(monkeypatch):
    """The other process has twice the gradients and a third of the weight."""

    def all_reduce(total):
        assert total.device.type == "cpu"
        total.mul_(1 + 2 * (1 / 3) / (2 / 3))

    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with emulated():
        a, b = torch.ones(3, device=CUDA), torch.ones(2, 2, device=CUDA)
        distributed.all_reduce_mean([a, b], weight=2 / 3)
        assert waits == ["from the GPU", "to the GPU"]
        assert torch.allclose(a.cpu(), torch.full((3,), 4 / 3))
        assert torch.allclose(b.cpu(), torch.full((2, 2), 4 / 3))


@pytest.mark.parametrize(
    ("capability", "scale", "dtype", "options"),
    [((7, 5), 3, "fp32", ["--self-ensemble"]), ((8, 0), 2, "bf16", []), ((12, 0), 4, "bf16", [])],
)
def test_upscaling_gives_same_pixels_as_on_cpu(cli, pictures, capability, scale, dtype, options):
    """Exactly in fp32, and within a gray level in bf16, which auto selects on GPUs of capability 8.0 or more."""
    Path("in").mkdir()
    for mode in ("RGB", "L", "RGBA", "I;16"):
        random_image(mode, (14, 11)).save(f"in/{mode.replace(';', '')}.png")
    args = ["--checkpoint=net", "in", "--tile=8", *options]
    assert cli("super_resolve.py", *args, "--precision=fp32", "--output=cpu")[0] == 0
    with emulated(capability):
        status, out, _ = cli("super_resolve.py", *args, "--cuda", "--output=gpu")
    assert (status, out.count(f"on cuda, {dtype}")) == (0, 4)
    for path in Path("cpu").iterdir():
        a, b = (np.asarray(Image.open(p)).astype(int) for p in (path, Path("gpu", path.name)))
        # Levels of 16-bit gray are so small that results depend on how many threads compute a tile.
        exact = dtype == "fp32" and not path.stem.startswith("I16")
        assert abs(a - b).max() <= (0 if exact else 1)

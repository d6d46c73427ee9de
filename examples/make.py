"""Regenerate the pictures and charts of the README and the docs: `python examples/make.py`.

The training curves come from examples/training.csv. `python examples/make.py --runs runs/A runs/B` first writes
that file from the TensorBoard logs of these runs. The speeds come from the table in docs/speed.md. photo.png is part of
NASA's portrait of the astronaut Eileen Collins, which is in the public domain, from scikit-image.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.figure import Figure
from PIL import Image
from scene import draw_scene

from data import degrade
from imaging.images import bicubic, to_tensor
from imaging.metrics import measure
from model import SCALE
from super_resolve import load_upscaler, upscale

HERE = Path(__file__).parent
GREEN, ORANGE, GRAY = "#0b6e4f", "#c84c09", "#8a8a8a"
LEVELS = {"the paper, three days on a GPU: 32.39 dB": 32.39, "bicubic: 30.40 dB": 30.403}
PHOTO_DETAIL, SCENE_DETAIL, ZOOM, GAP = (21, 24, 129, 96), (275, 103, 383, 160), 3, 8

# ------------------------------------------------------------------------------ pictures


def comparison(folder: Path) -> tuple[Image.Image, float]:
    """Save the scene as lr.bmp and hr.png. Return enlarged details, and the scene's gain in dB on luma.

    The rows are the photo and the scene, and the columns are bicubic interpolation, SRCNN and the ground truth.
    """
    lr, hr = degrade(draw_scene())
    lr.save(folder / "lr.bmp")
    hr.save(folder / "hr.png")
    upscaler, rows = load_upscaler(precision="fp32"), []
    for truth, box in ((Image.open(HERE / "photo.png"), PHOTO_DETAIL), (hr, SCENE_DETAIL)):
        small, _ = degrade(truth)
        columns = bicubic(small, truth.size), upscale(small, upscaler), truth
        rows.append([enlarged(image.crop(box)) for image in columns])
    width, height = rows[0][0].width + GAP, sum(row[0].height + GAP for row in rows)
    picture, top = Image.new("RGB", (3 * width - GAP, height - GAP), "white"), 0
    for row in rows:
        for column, detail in enumerate(row):
            picture.paste(detail, (column * width, top))
        top += row[0].height + GAP
    quality = [measure(to_tensor(image), to_tensor(hr), SCALE).psnr_y for image in columns[:2]]
    return picture, quality[1] - quality[0]


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize((ZOOM * image.width, ZOOM * image.height), Image.Resampling.NEAREST)


# -------------------------------------------------------------------------------- charts


def read_runs(folders: list[Path]) -> None:
    """Write training.csv from TensorBoard logs: PSNR on Y of the test set, and the seconds since the log was opened."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(HERE / "training.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["training", "seconds", "psnr_y"])
        for folder in folders:
            log = EventAccumulator(str(folder)).Reload()
            tag = next(tag for tag in log.Tags()["scalars"] if tag.endswith("/psnr_y"))
            events = log.Scalars(tag)
            for event in events:
                seconds = event.wall_time - log.FirstEventTimestamp()
                writer.writerow((f"{len(events)} epochs", f"{seconds:.1f}", f"{event.value:.3f}"))


def training_chart() -> Figure:
    """Plot the curves of training.csv, with the levels of bicubic interpolation and the paper."""
    with open(HERE / "training.csv", newline="") as file:
        rows = [(row["training"], float(row["seconds"]), float(row["psnr_y"])) for row in csv.DictReader(file)]
    figure, axes = chart("seconds of training on one CPU core", "Set5 x3, mean PSNR on Y (dB)", height=2.9)
    for label, level in LEVELS.items():
        axes.axhline(level, color=GRAY, linestyle="--", linewidth=1)
        axes.text(1, level - 0.05, label, color="#555555", ha="right", va="top", transform=axes.get_yaxis_transform())
    for name, color in zip(dict.fromkeys(row[0] for row in rows), (GREEN, ORANGE), strict=False):
        seconds, values = zip(*[row[1:] for row in rows if row[0] == name], strict=True)
        axes.plot(seconds, values, color=color, linewidth=2, label=f"train.py train --num-epoch={name.split()[0]}")
    axes.set(ylim=(30, 33), xlim=(0, None))
    axes.legend(loc="center right", frameon=False)
    return figure


def speed_chart() -> Figure:
    """Plot the speed of plain PyTorch, fp32 and bf16 in training and inference, from the table in docs/speed.md."""
    table = (HERE.parent / "docs" / "speed.md").read_text()
    figure, axes = chart("HR megapixels per second", "", height=2.2)
    bars = []
    for task in ("training", "inference, 512 x 512"):
        for variant, color in (("plain", GRAY), ("fp32", ORANGE), ("bf16", GREEN)):
            row = re.search(rf"^\| {task} \| {variant} \| ([\d.]+) \| ([\d.]+) \|", table, re.M)
            assert row, f"docs/speed.md has no row {task}, {variant}"
            label = "plain PyTorch" if variant == "plain" else variant
            bars.append((f"{task.split(',')[0]}, {label}", float(row[1]), color, float(row[2])))
    for position, (_, speed, color, ratio) in enumerate(bars):
        axes.barh(position, speed, color=color)
        axes.text(speed, position, f" {speed:.1f}" + (f" ({ratio:.1f}x)" if ratio > 1 else ""), va="center")
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(bar[1] for bar in bars))
    axes.grid(False, axis="y")
    return figure


def chart(x: str, y: str, height: float) -> tuple:
    """Return an empty figure and its axes in the style of all charts, whose text is legible at 400 pixels too."""
    figure = Figure(figsize=(5.6, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e4e4")
    axes.set_axisbelow(True)
    return figure, axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="TensorBoard logs to read the curves from")
    runs = parser.parse_args().runs
    if runs:
        read_runs(runs)
    comparison(HERE)[0].save(HERE / "comparison.png")
    training_chart().savefig(HERE / "training.png")
    speed_chart().savefig(HERE / "speed.png")


if __name__ == "__main__":
    main()

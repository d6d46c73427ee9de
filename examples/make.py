"""Make the README's pictures again: `python examples/make.py`, in the project's folder.

The curves are those of examples/training.csv; `python examples/make.py --runs runs/A runs/B` first takes them
from TensorBoard's logs of trainings that were just run.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from checkpoints import load_checkpoint
from data import degrade
from dead_leaves import dead_leaves
from images import to_image

HERE = Path(__file__).parent
LINES = {"the paper, 91 images: 32.39 dB, three days": 32.39, "bicubic: 30.40 dB": 30.403}
COLOURS = ("#0b6e4f", "#c84c09", "#3057a4")


def comparison() -> None:
    """An image that the project draws itself, its LR version, and both beside what the network makes of it."""
    lr, hr = degrade(dead_leaves("test", 3, 240)["leaves3"])
    lr.save(HERE / "lr.bmp")
    hr.save(HERE / "hr.bmp")
    command = [sys.executable, "super_resolve.py", "--checkpoint=checkpoint.pth", "--precision=fp32"]
    subprocess.run([*command, HERE / "lr.bmp", "--ground-truth", HERE / "hr.bmp"], check=True)


def filters() -> None:
    """The 64 filters of the first layer, each from its least value to its greatest."""
    weights = load_checkpoint(Path("checkpoint.pth")).model["conv1.weight"]
    grid = make_grid(weights, nrow=16, padding=1, normalize=True, scale_each=True, pad_value=1)
    image = to_image(grid.mul(255).round().byte())
    image.resize((5 * image.width, 5 * image.height), Image.Resampling.NEAREST).save(HERE / "filters.png")


def read_runs(folders: list[Path]) -> None:
    """PSNR on Y of the test set over the seconds since the log was opened, from TensorBoard's logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(HERE / "training.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["training", "seconds", "psnr_y"])
        for folder in folders:
            log = EventAccumulator(str(folder)).Reload()
            tag = next(tag for tag in log.Tags()["scalars"] if tag.endswith("/psnr_y"))
            events = log.Scalars(tag)
            for event in events:
                row = (
                    f"{len(events)} epochs",
                    f"{event.wall_time - log.FirstEventTimestamp():.1f}",
                    f"{event.value:.3f}",
                )
                writer.writerow(row)


def curves() -> None:
    """The chart of training.csv, drawn three times as large for smooth lines."""
    with open(HERE / "training.csv", newline="") as file:
        rows = [(row["training"], float(row["seconds"]), float(row["psnr_y"])) for row in csv.DictReader(file)]
    width, height, left, bottom, fine = 900, 420, 70, 50, 3
    low, high, longest = 30.0, 33.0, max(seconds for _, seconds, _ in rows) * 1.02
    image = Image.new("RGB", (fine * width, fine * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15 * fine)

    def place(seconds: float, psnr: float) -> tuple[float, float]:
        x = left + (width - left - 20) * seconds / longest
        return fine * x, fine * (height - bottom - (height - bottom - 44) * (psnr - low) / (high - low))

    for psnr in (30, 30.5, 31, 31.5, 32, 32.5, 33):
        draw.line([place(0, psnr), place(longest, psnr)], "#dddddd", fine)
        x, y = place(0, psnr)
        draw.text((x - 8 * fine, y), f"{psnr:.1f}", "black", font, anchor="rm")
    for seconds in range(0, int(longest) + 1, 20):
        x, y = place(seconds, low)
        draw.text((x, y + 8 * fine), str(seconds), "black", font, anchor="mt")
    draw.text(
        (fine * width / 2, fine * (height - 6)), "seconds of training on two CPU cores", "black", font, anchor="mb"
    )
    draw.text((fine * 24, fine * 6), "Set5 x3, mean PSNR on Y (dB)", "black", font)
    for name, psnr in LINES.items():
        draw.line([place(0, psnr), place(longest, psnr)], "#555555", 2 * fine)
        x, y = place(longest, psnr)
        draw.text((x - 4 * fine, y + 3 * fine), name, "#555555", font, anchor="rt")
    for i, name in enumerate(dict.fromkeys(row[0] for row in rows)):
        points = [place(seconds, psnr) for training, seconds, psnr in rows if training == name and psnr > low]
        draw.line(points, COLOURS[i], 3 * fine, joint="curve")
        x, y = place(longest / 2, 31.7 - 0.2 * i)
        draw.line([x, y, x + 30 * fine, y], COLOURS[i], 3 * fine)
        draw.text((x + 38 * fine, y), f"train.py train --num-epoch={name.split()[0]}", "black", font, anchor="lm")
    image.reduce(fine).save(HERE / "training.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", help="logs to take the curves from")
    runs = parser.parse_args().runs
    if runs:
        read_runs(runs)
    comparison()
    filters()
    curves()


if __name__ == "__main__":
    main()

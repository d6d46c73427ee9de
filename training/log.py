"""TensorBoard log of a training run, and interrupts between its writes."""

import contextlib
import io
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import TestImage, TestSet
from imaging.formats import FORMATS
from imaging.images import to_image, to_tensor
from imaging.metrics import Report
from model import SRCNN
from training.options import Options
from upscaling.upscaler import Upscaler
from utils import TERMINATION_SIGNALS, handle_signals, printable, warn

MAX_PICTURES, PICTURE_SIDE = 20, 200  # number of test images that are shown, and LR pixels of each
FRAME = 2  # width in pixels of the frames around images that are shown together


class Log:
    """TensorBoard log of a run. If it cannot be written, training continues without it after one warning.

    Parameters
    ----------
    folder : folder of the event files; None to log nothing
    epoch : last epoch to keep; TensorBoard discards later events, from a run that had gone further
    options : shown as text, and in TensorBoard's comparison of runs
    """

    def __init__(self, folder: Path | None, epoch: int, options: Options) -> None:
        self.writer, args = None, options.to_args()
        self.args = {name: printable(value) if isinstance(value, str) else value for name, value in args.items()}
        self.excepthook, threading.excepthook = threading.excepthook, self.ignore_write_errors
        if not folder:
            return
        with self.errors_as_warning():
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)
            rows = "".join(f"| {name} | {value} |\n" for name, value in self.args.items())
            self.writer.add_text("arguments", f"| option | value |\n| --- | --- |\n{rows}", epoch)

    def ignore_write_errors(self, args: threading.ExceptHookArgs) -> None:
        """Do not report what fails in TensorBoard's thread, since its next call raises the same error."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self.excepthook(args)

    @contextlib.contextmanager
    def errors_as_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training is worth more than its log
            self.writer, reason = None, str(error).partition("\n")[0] or type(error).__name__
            warn(f"TensorBoard's log cannot be written, so training continues without it: {reason}")

    def write(self, epoch: int, report: Report, loss: float, learning_rate: float) -> None:
        if not self.writer:
            return
        values = {"train/loss": loss, "train/learning_rate": learning_rate}
        values |= {f"{report.set}/{measure}": value for measure, value in report.mean.srcnn._asdict().items()}
        for name, scores in report.images.items():
            values |= {f"{report.set}_{measure}/{name}": value for measure, value in scores.srcnn._asdict().items()}
        with self.errors_as_warning():
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()

    def write_pictures(self, epoch: int, model: SRCNN, test_set: TestSet) -> None:
        """Write bicubic, SRCNN and ground truth of test images side by side, and the filters of conv1."""
        if not self.writer:
            return
        upscale = Upscaler(model)
        with self.errors_as_warning():
            for name, image in islice(test_set.images.items(), MAX_PICTURES):
                lr, bicubic, hr = cut_center(image)
                panels = [panel.expand(3, -1, -1) for panel in (bicubic, to_tensor(upscale(lr)), hr)]
                sheet = grid(torch.stack(panels), columns=3)
                self.add_image(f"{test_set.name}/{name}: bicubic, SRCNN, ground truth", sheet, epoch)
            self.add_image("conv1/filters", filters(model).mul(255).round().byte(), epoch)
            self.writer.flush()

    def add_image(self, tag: str, image: Tensor, epoch: int) -> None:
        """Write a uint8 image, (3, h, w), as add_image of SummaryWriter does, but as JPEG.

        With its PNG files, the pictures of Set5 take more than a second: half of it to compress them, and the rest
        because TensorBoard computes checksums in Python.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self.writer
        assert self.writer.file_writer
        content, (_, height, width) = io.BytesIO(), image.shape
        to_image(image).save(content, "JPEG", **FORMATS["JPEG"].options)
        jpeg = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content.getvalue())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=jpeg)]), epoch)

    def write_result(self, epoch: int, report: Report) -> None:
        """Write the last report of a finished run, for TensorBoard's comparison of runs.

        It has a folder of its own, since TensorBoard would otherwise show a resumed run with the options of its first
        end.
        """
        if self.writer:
            final = {f"final/{measure}": value for measure, value in report.mean.srcnn._asdict().items()}
            with self.errors_as_warning():
                self.writer.add_hparams(self.args, final, run_name=f"end-{epoch}")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            with self.errors_as_warning():
                self.writer.close()
        threading.excepthook = self.excepthook


def cut_center(image: TestImage) -> tuple[Image.Image, Tensor, Tensor]:
    """Return the LR image, bicubic interpolation and the ground truth, or the center of them if they are large."""
    (left, width), (top, height) = (
        (max(side - PICTURE_SIDE, 0) // 2, min(side, PICTURE_SIDE)) for side in image.lr.size
    )
    scale = image.hr.shape[1] // image.lr.height
    rows, columns = (slice(scale * start, scale * (start + side)) for start, side in ((top, height), (left, width)))
    lr = image.lr.crop((left, top, left + width, top + height))
    return lr, image.bicubic[:, rows, columns], image.hr[:, rows, columns]


def filters(model: SRCNN) -> Tensor:
    """Return an image of the filters of conv1, enlarged, each scaled from its minimum to its maximum."""
    weights = model.conv1.weight.detach().cpu()  # (64, 3, 9, 9)
    low, high = weights.amin((1, 2, 3), keepdim=True), weights.amax((1, 2, 3), keepdim=True)
    scaled = (weights - low) / (high - low).clamp(min=1e-5)
    return grid(scaled.repeat_interleave(4, 2).repeat_interleave(4, 3), columns=16, frame=1)


def grid(images: Tensor, columns: int, frame: float = 0) -> Tensor:
    """Arrange images, (rows * columns, 3, h, w), in one image, (3, H, W), with frames of this value.

    torchvision.utils.make_grid does the same, but takes more than a second to import.
    """
    rows = F.pad(images, (FRAME, 0, FRAME, 0), value=frame).unflatten(0, (-1, columns))  # (rows, columns, 3, h', w')
    return F.pad(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, FRAME, 0, FRAME), value=frame)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Defer the first SIGINT, SIGTERM or SIGHUP until the yielded function is called: it raises KeyboardInterrupt.

    TensorBoard's writer may deadlock if it is interrupted. A second Ctrl-C takes effect at once.
    """
    received: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def raise_deferred() -> None:
        if received:
            raise KeyboardInterrupt(received[0])

    with handle_signals([signal.SIGINT, *TERMINATION_SIGNALS], defer):
        yield raise_deferred

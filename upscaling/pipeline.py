"""A pipeline: while an image is upscaled, the next one is read and earlier ones are written."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import NamedTuple, TypeVar

from PIL import Image

from imaging.comparison import compare
from imaging.images import PILLOW_SETTINGS, check_output, flatten, read_hr, read_image, write_image
from imaging.metadata import upscaled_metadata
from imaging.metrics import Scores, min_side
from model import SCALES
from upscaling.device import dtype_name
from upscaling.jobs import Job
from upscaling.upscaler import Upscaler
from utils import TERMINATION_SIGNALS, CommandError, Message, collect_messages, handle_signals, show, show_collected

T = TypeVar("T")
WRITERS = min(4, os.cpu_count() or 1)  # threads; on a GPU, writing takes longer than upscaling
MAX_WRITTEN = 2**28  # pixels being written, of 4 bytes each in Pillow: two photos of 12 megapixels upscaled by 3


def upscale_with_metadata(lr: Image.Image, upscaler: Upscaler, label: str = "") -> Image.Image:
    """Upscale an image of :func:`read_image`, and its resolution and size in metadata."""
    sr = upscaler(lr, label)
    sr.info = upscaled_metadata(lr.info, sr.size, upscaler.scale)
    return sr


# -------------------------------------------------------------------------------- steps


class Loaded(NamedTuple):
    lr: Image.Image
    hr: Image.Image | None  # ground truth
    seconds: float  # time of the steps so far, without waiting between them


class Upscaled(NamedTuple):
    sr: Image.Image
    picture: Image.Image | None  # comparison with the ground truth
    scores: Scores | None
    lr_size: tuple[int, int]
    seconds: float  # as in Loaded, and without the comparison


class Steps(NamedTuple):
    """The three steps of a job, each of which may run in another thread."""

    upscaler: Upscaler
    max_pixels: int  # maximum size of an input

    def run(self, job: Job) -> Scores | None:
        """Read, upscale and write an image. If there is a ground truth, write a comparison and return the scores."""
        return self.write(job, self.upscale(job, self.read(job)))

    def read(self, job: Job) -> Loaded:
        """Read an image and its ground truth. Raise CommandError, also if the output is impossible."""
        start, scale = time.perf_counter(), self.upscaler.scale
        job.check()
        lr = read_image(job.lr, self.max_pixels)
        check_output(job.sr, (scale * lr.width, scale * lr.height), lr.mode, job.format)
        hr = read_hr(job.hr, min_side(scale), (scale + 1) ** 2 * self.max_pixels) if job.hr else None
        if hr and not fits(hr, lr, scale):
            fitting = [other for other in SCALES if fits(hr, lr, other)]
            hint = f"; it fits x{fitting[0]}, so use a checkpoint for that" if fitting else ""
            problem = f"{hr.width}x{hr.height} is not {scale} times {lr.width}x{lr.height}{hint}"
            raise CommandError(f"{job.hr}: {problem}")
        return Loaded(lr, hr, time.perf_counter() - start)

    def upscale(self, job: Job, loaded: Loaded) -> Upscaled:
        """Upscale an image, and compare it with its ground truth if there is one."""
        start, (lr, hr, seconds) = time.perf_counter(), loaded
        sr = upscale_with_metadata(lr, self.upscaler, job.lr.name)
        seconds += time.perf_counter() - start
        if not hr:
            return Upscaled(sr, None, None, lr.size, seconds)
        with PILLOW_SETTINGS:  # for cropping and text, Pillow has the same limit of pixels as for reading
            picture, scores = compare(flatten(lr), flatten(sr), hr, self.upscaler.scale)
        return Upscaled(sr, picture, scores, lr.size, seconds)

    def write(self, job: Job, image: Upscaled, stop: threading.Event | None = None) -> Scores | None:
        """Write an image and its comparison, unless ``stop`` is set meanwhile. Return the scores."""
        start, (width, height) = time.perf_counter(), image.lr_size
        write_image(image.sr, job.sr, image.sr.info, job.format, stop)
        seconds = image.seconds + time.perf_counter() - start
        how = f"{self.upscaler.device.type}, {dtype_name(self.upscaler.dtype)}"
        show(f"{job.sr}: {width}x{height} -> {image.sr.width}x{image.sr.height} in {seconds:.2f} s on {how}")
        if image.picture:
            write_image(image.picture, job.comparison, {}, stop=stop)
            show(job.comparison)
        return image.scores


def fits(hr: Image.Image, lr: Image.Image, scale: int) -> bool:
    """Return whether an HR image is ``scale`` times as wide and high as an LR image, or a few pixels more."""
    return all(0 <= a - scale * b < scale for a, b in zip(hr.size, lr.size, strict=True))


# ----------------------------------------------------------------------------- pipeline


class Task:
    """A job in the pipeline."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.messages: list[Message] = []
        self.result: Future[Scores | None] = Future()
        self.pixels = 0  # pixels of the output

    def call(self, step: Callable[..., T], *arguments: object) -> T:
        """Call a step, and keep its messages until it is the turn of this job."""
        with collect_messages(self.messages):
            return step(self.job, *arguments)

    def finish(self) -> tuple[Job, Future[Scores | None]]:
        """Wait for the result, and show the messages."""
        result = self.result
        del self.result  # the traceback of an error refers to this object: a cycle, which would keep its image
        wait([result])
        show_collected(self.messages)
        return self.job, result


def run_in_pipeline(jobs: list[Job], steps: Steps) -> Generator[tuple[Job, Future[Scores | None]], None, None]:
    """Run jobs, and yield each in order with its result, when its messages have been shown.

    Only one thread reads, since Pillow's settings for reading affect all threads. At any time, one image is read or
    waits for this thread, one is upscaled, and at most WRITERS are written, with at most MAX_WRITTEN pixels in total
    unless there is only one. Close the generator to stop early: then nothing more is written, and incomplete files are
    removed.
    """
    stop, unfinished = threading.Event(), deque[Task]()
    reader, writers = ThreadPoolExecutor(1), ThreadPoolExecutor(WRITERS)
    try:
        waiting, loading = map(Task, jobs), deque[tuple[Task, Future[Loaded]]]()

        def load_next() -> None:
            for task in islice(waiting, 1):  # none at the end
                loading.append((task, reader.submit(task.call, steps.read)))

        load_next()
        while loading:
            (task, loaded), image = loading.popleft(), None
            load_next()
            try:
                image = task.call(steps.upscale, loaded.result())
                task.pixels = image.sr.width * image.sr.height
            except Exception as error:
                task.result.set_exception(error)
            while unfinished and not has_room(task.pixels, unfinished):
                yield unfinished.popleft().finish()
            if image:
                task.result = writers.submit(task.call, steps.write, image, stop)
            unfinished.append(task)
            del loaded, image  # as soon as it is written, its memory is free
            while unfinished and unfinished[0].result.done():
                yield unfinished.popleft().finish()
        while unfinished:
            yield unfinished.popleft().finish()
    finally:
        with handle_signals([signal.SIGINT, *TERMINATION_SIGNALS], lambda *_: None):
            # This waits until the next image is decoded and a WebP is encoded: these threads cannot be interrupted.
            stop.set()
            writers.shutdown(cancel_futures=True)
            reader.shutdown(cancel_futures=True)


def has_room(pixels: int, unfinished: Iterable[Task]) -> bool:
    """Return whether an image of this size may be written beside those that are unfinished."""
    sizes = [task.pixels for task in unfinished]
    return len(sizes) < WRITERS and sum(sizes) + pixels <= MAX_WRITTEN

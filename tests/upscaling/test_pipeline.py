"""Reading, upscaling and writing at the same time. Threads wait for each other by events, not by time."""

import io
import os
import signal
import sys
import threading
import weakref
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest
from helpers import assert_one_line, contents, random_image
from PIL import Image

import utils
from imaging.images import PILLOW_SETTINGS, read_image
from super_resolve import load_upscaler, run_share
from upscaling import pipeline
from upscaling.jobs import find_jobs
from upscaling.pipeline import Upscaled, run_in_pipeline
from utils import FileWithoutDescriptor, show, warn

COMMAND = ("super_resolve.py", "--precision=fp32", "--checkpoint=net")
TIMEOUT = 60  # seconds that only a broken pipeline waits


class FakeSteps:
    """Steps that show messages, and that wait as a test wants. Jobs are numbers, and images of ``sizes`` pixels."""

    def __init__(self, *sizes):
        self.sizes, self.waits, self.errors = sizes, defaultdict(lambda: lambda: None), {}
        self.ended = defaultdict(threading.Event)  # steps

    def step(self, name, job):
        self.waits[name, job]()
        warn(f"{name} {job}")
        self.ended[name, job].set()
        if error := self.errors.get((name, job)):
            raise error

    def read(self, job):
        self.step("read", job)
        return job

    def upscale(self, job, loaded):
        assert loaded == job
        self.step("upscale", job)
        return Upscaled(Image.new("L", (self.sizes[job], 1)), None, None, (1, 1), 0)

    def write(self, job, image, stop):
        assert image.sr.width == self.sizes[job]
        self.step("write", job)
        show(f"{job} is written")
        return job

    def run(self):
        """Return the results by job, errors included."""
        with closing(run_in_pipeline(list(range(len(self.sizes))), self)) as finished:
            return [(job, result.exception() or result.result()) for job, result in finished]


def meeting(number):
    """Return a function that waits until it has been called by this number of threads."""
    barrier = threading.Barrier(number)
    return lambda: barrier.wait(TIMEOUT)


@pytest.fixture
def _two_writers(monkeypatch):
    monkeypatch.setattr(pipeline, "WRITERS", 2)


@pytest.fixture
def turns(monkeypatch):
    """Return events, by job, that are set when the main thread begins to wait for a job's result."""
    events, wait, number = [threading.Event() for _ in range(20)], pipeline.wait, iter(range(20))
    monkeypatch.setattr(pipeline, "wait", lambda futures: events[next(number)].set() or wait(futures))
    return events


# ---------------------------------------------------------------------------- the threads


def test_next_image_is_read_and_previous_one_written_while_one_is_upscaled():
    steps = FakeSteps(1, 1, 1, 1)
    for job in (0, 1):
        together = meeting(3)
        for step in (("write", job), ("upscale", job + 1), ("read", job + 2)):
            steps.waits[step] = together
    assert steps.run() == [(job, job) for job in range(4)]


@pytest.mark.usefixtures("_two_writers")
def test_messages_are_in_order_of_jobs_and_steps_whichever_thread_is_slow(capfd, monkeypatch):
    """The second image is written before the first, while the third is read."""
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    steps = FakeSteps(1, 1, 1)
    for slow in (("write", 0), ("read", 2)):
        steps.waits[slow] = lambda: steps.ended["write", 1].wait(TIMEOUT)
    steps.run()
    expected = []
    for job in range(3):
        expected += [*(f"WARNING: {step} {job}" for step in ("read", "upscale", "write")), f"{job} is written"]
    assert capfd.readouterr().err.splitlines() == expected


@pytest.mark.usefixtures("_two_writers")
def test_at_most_one_image_is_read_one_upscaled_and_a_few_written(turns):
    """Writers are as slow as possible: each waits until the main thread only waits, and the next image has been read.

    Images are counted from the end of reading to the end of writing.
    """
    steps, alive, most, lock, ahead = FakeSteps(*[1] * 8), set(), [], threading.Lock(), defaultdict(threading.Event)

    def enter(job):
        with lock:
            alive.add(job)
            most.append(len(alive))
        ahead[job].set()

    def leave(job):
        assert turns[job].wait(TIMEOUT)
        assert ahead[min(job + 3, 7)].wait(TIMEOUT)
        with lock:
            alive.remove(job)

    for job in range(8):
        steps.waits["read", job] = lambda job=job: enter(job)
        steps.waits["write", job] = lambda job=job: leave(job)
    steps.run()
    assert max(most) == 4


def test_pixels_that_are_written_at_once_are_limited(turns, monkeypatch):
    """Writers are as slow as possible, as above. An image above the limit is written alone."""
    monkeypatch.setattr(pipeline, "WRITERS", 3)
    monkeypatch.setattr(pipeline, "MAX_WRITTEN", 100)
    sizes, lock, written, found = (60, 40, 1, 99, 300, 1, 50, 50, 50, 9), threading.Lock(), [], []
    steps, started, together = FakeSteps(*sizes), [threading.Event() for _ in sizes], {0: 1, 6: 7}

    def write(job):
        with lock:
            written.append(sizes[job])
            found.append(list(written))
        started[job].set()
        assert started[together.get(job, job)].wait(TIMEOUT)
        assert turns[job].wait(TIMEOUT)
        with lock:
            written.remove(sizes[job])

    for job in range(len(sizes)):
        steps.waits["write", job] = lambda job=job: write(job)
    steps.run()
    assert all(len(group) <= 3 and (sum(group) <= 100 or len(group) == 1) for group in found)
    assert {tuple(sorted(group)) for group in found} >= {(40, 60), (300,), (50, 50)}


def test_memory_of_an_image_is_free_as_soon_as_it_is_written():
    steps, free, found = FakeSteps(1, 1), threading.Event(), []
    upscale = steps.upscale

    def upscale_when_first_is_free(job, loaded):
        if job == 1:
            found.append(free.wait(TIMEOUT))
        image = upscale(job, loaded)
        weakref.finalize(image.sr, free.set)
        return image

    steps.upscale = upscale_when_first_is_free
    steps.run()
    assert found == [True]


@pytest.mark.parametrize("step", ["read", "upscale", "write"])
def test_memory_of_an_image_that_fails_is_free_after_its_turn(step):
    steps, free = FakeSteps(1, 1, 1), threading.Event()

    def fail():
        image = Image.new("L", (1, 1))  # the traceback refers to it
        weakref.finalize(image, free.set)
        raise ValueError

    steps.waits[step, 0] = fail
    with closing(run_in_pipeline([0, 1, 2], steps)) as finished:
        assert [free.is_set() for _, result in finished][2]


@pytest.mark.parametrize("step", ["read", "upscale", "write"])
def test_failure_of_a_step_stops_no_other_job_and_is_reported_in_its_place(capfd, step):
    steps = FakeSteps(1, 1, 1, 1)
    steps.errors[step, 1] = error = ValueError("no")
    assert steps.run() == [(0, 0), (1, error), (2, 2), (3, 3)]
    steps_of_1 = [line.split()[1] for line in capfd.readouterr().err.splitlines() if line.endswith("1")]
    assert steps_of_1 == ["read", "upscale", "write"][: 1 + ["read", "upscale", "write"].index(step)]


def test_nothing_more_is_computed_when_pipeline_is_left():
    steps, upscaled = FakeSteps(*[1] * 9), []
    for job in range(9):
        steps.waits["upscale", job] = lambda job=job: upscaled.append(job)
    with closing(run_in_pipeline(list(range(9)), steps)) as finished:
        assert next(finished)[0] == 0
        before = len(upscaled)
    assert len(upscaled) == before < 9


# ---------------------------------------------------------------------------- real images


@pytest.fixture
def folder(pictures):
    """Write images of several formats, each with a ground truth, and return their names."""
    names = ["a.png", "b.jpg", "c.webp", "d.tif", "e.bmp"]
    for name in ("in", "hr"):
        Path(name).mkdir()
    for number, name in enumerate(names):
        random_image(size=(20 + number, 31), seed=number).save(f"in/{name}")
        random_image(size=(60 + 3 * number, 93), seed=number).save(f"hr/{name[0]}.png")
    return names


def test_outputs_are_the_same_as_one_image_at_a_time(cli, folder):
    assert cli(*COMMAND, "in", "--output=together", "--ground-truth=hr")[0] == 0
    for name in folder:
        assert cli(*COMMAND, f"in/{name}", "--output=apart/", f"--ground-truth=hr/{name[0]}.png")[0] == 0
    together, apart = contents("together"), contents("apart")
    assert len(together) == 2 * len(folder)
    assert list(together.values()) == list(apart.values())


def test_result_line_and_comparison_follow_the_warnings_of_their_image(cli, folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    random_image(size=(65, 94)).save("hr/b.png")  # larger than 63x93
    random_image(size=(71, 95)).save("hr/d.png")  # larger than 69x93
    random_image(size=(23, 31)).save("in/d.tif", save_all=True, append_images=[random_image()])
    lines = cli(*COMMAND, "in", "--output=o", "--ground-truth=hr")[1].splitlines()[:13]
    assert [line.partition(":")[0] if "WARN" in line else line.partition(":")[0][2:] for line in lines] == [
        *("a_srcnn_x3.png", "a_srcnn_x3_comparison.png"),
        *("WARNING", "b_srcnn_x3.jpg", "b_srcnn_x3_comparison.png"),
        *("c_srcnn_x3.webp", "c_srcnn_x3_comparison.png"),
        *("WARNING", "WARNING", "d_srcnn_x3.tif", "d_srcnn_x3_comparison.png"),
        *("e_srcnn_x3.bmp", "e_srcnn_x3_comparison.png"),
    ]


def test_single_image_needs_no_threads(cli, pictures, monkeypatch):
    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", None)
    assert cli(*COMMAND, "lr.bmp", "--ground-truth=hr.png")[0] == 0


def another_thread_could_read():
    """Return whether another thread could read an image now."""
    results = []

    def attempt():
        results.append(PILLOW_SETTINGS.acquire(blocking=False))
        if results[0]:
            PILLOW_SETTINGS.release()

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return results[0]


def test_nothing_is_compared_or_opened_while_an_image_is_read(cli, folder, monkeypatch):
    """Pillow's limit of pixels also concerns cropping and text."""
    seen, compare, load = [], pipeline.compare, pipeline.read_image.__globals__["load_pixels"]
    monkeypatch.setattr(pipeline, "compare", lambda *a: seen.append(another_thread_could_read()) or compare(*a))
    monkeypatch.setattr("imaging.images.load_pixels", lambda f: seen.append(another_thread_could_read()) or load(f))
    assert cli(*COMMAND, "in", "--output=o", "--ground-truth=hr")[0] == 0
    assert seen == [False] * 15
    read_image(Path("in/a.png"))
    assert another_thread_could_read()


# -------------------------------------------------------------------- errors and interrupts


def test_lack_of_memory_in_a_thread_is_reported_with_its_image(cli, folder, monkeypatch):
    def fail(path, *args):
        if path.name == "b.jpg":
            raise MemoryError
        return read_image(path, *args)

    monkeypatch.setattr(pipeline, "read_image", fail)
    status, out, err = cli(*COMMAND, "in", "--output=o")
    assert (status, out.count(" -> ")) == (1, 4)
    assert err.startswith("error: out of memory; use a smaller")
    assert err.endswith("error: 1 of 5 images failed\n")


@pytest.mark.parametrize("function", ["read_image", "upscale_with_metadata", "write_image"])
def test_bug_in_any_thread_keeps_its_traceback(folder, monkeypatch, function):
    def with_a_bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, function, with_a_bug)
    upscaler = load_upscaler("net", precision="fp32")
    jobs = find_jobs([Path("in")], "o", None, Path("net"), 3)
    with pytest.raises(ZeroDivisionError) as error:
        run_share(jobs, upscaler, False, 10**6)
    assert error.traceback[-1].name == "with_a_bug"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_lack_of_threads_is_reported_in_one_line(cli, folder, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    status, out, err = cli(*COMMAND, "in", "--output=o")
    assert (status, out) == (1, "")
    assert_one_line(err, "error: cannot start another thread; ")


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_broken_pipe_on_stdout_stops_the_pipeline(cli, folder, monkeypatch):
    monkeypatch.setattr(pipeline, "WRITERS", 1)
    monkeypatch.setattr(sys, "stdout", BrokenPipe())
    status, _, err = cli(*COMMAND, "in", "--output=o")
    assert (status, err) == (1, "")
    assert "o/a_srcnn_x3.png" in contents("o")
    assert not {"o/d_srcnn_x3.tif", "o/e_srcnn_x3.bmp"} & contents("o").keys()


def interrupt_wait_for(event, number):
    """Return a replacement for wait() that raises a signal in the main thread once the event is set."""
    return lambda futures: event.wait(TIMEOUT) and signal.raise_signal(number)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.usefixtures("_default_signal_handlers")
@pytest.mark.parametrize(("number", "status"), SIGNALS, ids=["INT", "TERM", "HUP"])
@pytest.mark.parametrize("second", [False, True], ids=["once", "twice"])
def test_signal_during_a_write_leaves_nothing(cli, folder, monkeypatch, number, status, second):
    """The second signal comes while the command waits for its threads."""
    writing, write, calls, stopped = threading.Event(), FileWithoutDescriptor.write, [], []

    def interrupted_write(file, data):
        calls.append(len(os.listdir("o")))
        if len(calls) == 2:
            writing.set()
            stopped.append(file.stop.wait(TIMEOUT))
            if second:
                signal.pthread_kill(threading.main_thread().ident, number)
        return write(file, data)

    monkeypatch.setattr(pipeline, "WRITERS", 1)
    monkeypatch.setattr(pipeline, "wait", interrupt_wait_for(writing, number))
    monkeypatch.setattr(FileWithoutDescriptor, "write", interrupted_write)
    end, out, err = cli(*COMMAND, "in", "--output=o")
    assert (end, out, err) == (status, "", "interrupted\n")
    assert (calls, stopped, os.listdir("o")) == ([1, 1], [True], [])  # calls see the temporary file


@pytest.mark.usefixtures("_default_signal_handlers")
def test_image_that_is_complete_when_a_signal_comes_is_kept(cli, folder, monkeypatch):
    complete = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "WRITERS", 1)
        patch.setattr(pipeline, "wait", interrupt_wait_for(complete, signal.SIGINT))
        patch.setattr(utils, "sync_folder", lambda folder: complete.set())
        assert cli(*COMMAND, "in", "--output=o")[0] == 130
    assert os.listdir("o") == ["a_srcnn_x3.png"]
    assert "4 of 5 images upscaled" in cli(*COMMAND, "in", "--output=o", "--skip-existing")[1]
    assert len(contents("o")) == 5

import io
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, load, random_image, report, small_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from data import ImageSet, TestSet
from imaging.images import to_tensor
from train import linear_schedule
from training.log import Log, cut_center, deferred_interrupts, filters
from training.options import Options
from upscaling.upscaler import Upscaler
from utils import TERMINATION_SIGNALS, handle_signals, interrupt

OPTIONS = Options(learning_rate=0.002, train_data="photos")


def gradients():
    images = {"linear": Image.linear_gradient("L"), "radial": Image.radial_gradient("L")}
    return TestSet(ImageSet("gradients", {name: i.resize((45, 45)).convert("RGB") for name, i in images.items()}), 3)


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def values(log, tag):
    return [(event.step, event.value) for event in log.Scalars(tag)]


def test_epoch_is_logged_with_means_and_quality_of_each_image():
    with Log(Path("log"), 0, OPTIONS) as log:
        log.write(1, report(31.0), 0.5, 0.25)
    found = events("log")
    assert {tag: values(found, tag) for tag in found.Tags()["scalars"]} == {
        "train/loss": [(1, 0.5)],
        "train/learning_rate": [(1, 0.25)],
        "photos/psnr_y": [(1, 31.0)],
        "photos/psnr_rgb": [(1, 29.5)],
        "photos/ssim_y": [(1, 0.75)],
        "photos_psnr_y/a": [(1, 30.0)],
        "photos_psnr_y/b": [(1, 32.0)],
        "photos_psnr_rgb/a": [(1, 29.0)],
        "photos_psnr_rgb/b": [(1, 30.0)],
        "photos_ssim_y/a": [(1, 0.625)],
        "photos_ssim_y/b": [(1, 0.875)],
    }


def test_options_are_logged_as_table():
    with Log(Path("log"), 0, OPTIONS):
        pass
    (event,) = events("log").Tensors("arguments/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 0
    assert "| lr | 0.002 |\n" in text
    assert "| train_data | photos |\n" in text
    assert text.count("\n") == 2 + len(OPTIONS.to_args())


def test_resumed_run_replaces_events_after_its_epoch():
    for epochs, loss in (((1, 2, 3, 4, 5), 0.5), ((3, 4, 5, 6), 0.25)):
        with Log(Path("log"), epochs[0] - 1, OPTIONS) as log:
            for epoch in epochs:
                log.write(epoch, report(), loss, 0.25)
        time.sleep(1)  # TensorBoard reads files in the order of their names, which contain the second
    assert values(events("log"), "train/loss") == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25), (6, 0.25)]


def picture(log, name):
    """Return the only picture of this name, and its epoch."""
    (event,) = log.Images(name)
    return to_tensor(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")), event.step


def test_pictures_show_bicubic_srcnn_ground_truth_and_filters():
    test_set, model = gradients(), small_run().model
    with Log(Path("log"), 0, OPTIONS) as log:
        log.write_pictures(7, model, test_set)
    found = events("log")
    names = [f"gradients/{name}: bicubic, SRCNN, ground truth" for name in ("linear", "radial")]
    assert set(found.Tags()["images"]) == {*names, "conv1/filters"}
    for name, image in zip(names, test_set.images.values(), strict=True):
        sheet, epoch = picture(found, name)
        assert epoch == 7
        panels = [image.bicubic, to_tensor(Upscaler(model)(image.lr)), image.hr]
        for i, panel in enumerate(panels):  # each with a frame of 2 pixels
            shown = sheet[:, 2:-2, 2 + i * 47 : 47 + i * 47]
            assert (shown.float() - panel).abs().max() < 10  # JPEG, beside black frames
            assert (shown.float() - panel).abs().mean() < 1
    assert (picture(found, "conv1/filters")[0] / 255 - filters(model)).abs().mean() < 0.02


def test_each_filter_is_scaled_from_its_minimum_to_its_maximum():
    model = small_run().model
    sheet = filters(model)
    for i in (0, 17, 63):  # each is 36 pixels wide with a frame of 2, and a row has 16
        top, left = (2 + 38 * n for n in divmod(i, 16))
        weight = model.conv1.weight[i].detach()
        scaled = (weight - weight.min()) / (weight.max() - weight.min())
        for corner in (0, 3):
            shown = sheet[:, top + corner : top + 36 : 4, left + corner : left + 36 : 4]
            assert (shown - scaled).abs().max() < 1e-4


def test_end_of_run_is_logged_with_its_options():
    """For TensorBoard's page that compares runs."""
    with Log(Path("log"), 0, OPTIONS) as log:
        log.write_result(4, report(31.0))
    found = events("log/end-4")
    for key, value in (("psnr_y", 31.0), ("psnr_rgb", 29.5), ("ssim_y", 0.75)):
        assert [event.value for event in found.Scalars(f"final/{key}")] == [value]
    content = found.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["lr"].number_value == 0.002
    assert hparams["train_data"].string_value == "photos"


def write_everything(folder):
    with Log(folder, 0, OPTIONS) as log:
        for epoch in (1, 2):
            log.write(epoch, report(), 0.5, 0.25)
            log.write_pictures(epoch, small_run().model, gradients())
            log.write_result(epoch, report())


def test_log_without_folder_writes_nothing(tmp_path):
    write_everything(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("room", "error"),
    [(0, OSError(28, "full")), (1, OSError(28, "full")), (5, OSError(28, "full")), (3, RuntimeError("full"))],
    ids=str,
)
def test_log_that_cannot_be_written_warns_once(monkeypatch, capfd, room, error):
    """TensorBoard writes in a thread, whose error appears at a later call."""
    original, written = RecordWriter.write, []

    def write(self, record):
        written.append(record)
        if len(written) > room:
            raise error
        original(self, record)

    monkeypatch.setattr(RecordWriter, "write", write)
    write_everything(Path("runs/log"))
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard", "full")


@pytest.mark.parametrize("module", ["torch.utils.tensorboard", "tensorboard.compat.proto.summary_pb2"])
@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError])
def test_broken_package_ends_log_with_warning(monkeypatch, capfd, module, error):
    def find_spec(name, *_):
        if name == module:
            raise error("Descriptors cannot be created directly.\nRegenerate them.")

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [types.SimpleNamespace(find_spec=find_spec), *sys.meta_path])
    write_everything(Path("runs/log"))
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard", "continues without it: ", "created directly.\n")


def test_picture_that_cannot_be_made_ends_log_with_warning(monkeypatch, capfd):
    def grid(*arguments, **options):
        raise RuntimeError

    monkeypatch.setattr("training.log.grid", grid)
    write_everything(Path("runs/log"))
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard", ": RuntimeError\n")
    assert values(events("runs/log"), "train/loss") == [(1, 0.5)]


def test_lack_of_threads_ends_log_with_warning(monkeypatch, capfd):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    write_everything(Path("runs/log"))
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard", "can't start new thread")


def test_options_that_are_not_utf8_are_logged_escaped(capfd):
    with Log(Path("log"), 0, Options(train_data="\udcff")) as log:
        log.write_result(4, report())
    assert capfd.readouterr().err == ""
    (event,) = events("log").Tensors("arguments/text_summary")
    assert b"| train_data | \\udcff |\n" in event.tensor_proto.string_val[0]
    content = events("log/end-4").summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    assert metadata.parse_session_start_info_plugin_data(content).hparams["train_data"].string_value == "\\udcff"


def test_folder_that_is_not_utf8_ends_log_with_warning(capfd):
    write_everything(Path("log\udcff"))
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard", "surrogates not allowed")


def test_error_in_another_thread_is_reported(monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with Log(Path("runs/log"), 0, OPTIONS):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert [args.exc_type for args in seen] == [ZeroDivisionError]


def test_log_in_folder_that_cannot_be_made_warns_once(capfd):
    Path("runs").write_text("in the way")
    write_everything(Path("runs/log"))
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard", "runs")


def test_resumed_training_continues_log_without_overlap_or_gap(train_small, photos, tmp_path):
    assert train_small("--num-epoch=3", "--save-freq=2")[0] == 0
    time.sleep(1)  # TensorBoard reads files in the order of their names, which contain the second
    assert train_small(command=("resume", "checkpoint.2"))[0] == 0  # trains epoch 3 again
    (run,) = (tmp_path / "runs").iterdir()
    found, name, mean = events(run), photos.name, load("checkpoint.3")["report"]["mean"]
    steps, psnr = zip(*values(found, f"{name}/psnr_y"), strict=True)
    assert steps == (1, 2, 3)
    assert psnr[-1] == pytest.approx(mean["psnr_y"])
    rates = [linear_schedule(0.0025, 4 * epoch - 0.5, 12) for epoch in (1, 2, 3)]  # of each epoch's last step
    assert [rate for _, rate in values(found, "train/learning_rate")] == pytest.approx(rates)
    assert all([event.step for event in found.Images(tag)] == [1, 2, 3] for tag in found.Tags()["images"])
    assert values(events(run / "end-3"), "final/psnr_y")[0][1] == pytest.approx(mean["psnr_y"])


# ------------------------------------------------------------------------------ interrupts


def test_hangup_is_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals([signal.SIGHUP], interrupt), deferred_interrupts() as raise_deferred:
            signal.raise_signal(signal.SIGHUP)
            raise_deferred()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.usefixtures("_default_signal_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_interrupt_is_deferred_and_second_is_not(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, *TERMINATION_SIGNALS)]
    with deferred_interrupts() as raise_deferred:
        raise_deferred()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt, match=str(int(number))):
            raise_deferred()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGINT, *TERMINATION_SIGNALS)] == before


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_of_large_images_show_their_centers(scale):
    image = TestSet(ImageSet("x", {"a": random_image(size=(230 * scale, 90 * scale))}), scale).images["a"]
    lr, bicubic, hr = cut_center(image)
    assert lr == image.lr.crop((15, 0, 215, 90))
    assert torch.equal(bicubic, image.bicubic[:, :, 15 * scale : 215 * scale])
    assert torch.equal(hr, image.hr[:, :, 15 * scale : 215 * scale])

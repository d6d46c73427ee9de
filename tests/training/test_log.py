import io
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, load, report, small_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from data import ImageSet, TestSet
from imaging.images import to_tensor
from train import linear_schedule
from training.log import Log, filters
from training.options import Options
from upscaling.upscaler import Upscaler

OPTIONS = Options(learning_rate=0.002, train_data="photos")


def two_images():
    gradients = {"linear": Image.linear_gradient("L"), "radial": Image.radial_gradient("L")}
    return TestSet(ImageSet("gradients", {name: i.resize((45, 45)).convert("RGB") for name, i in gradients.items()}))


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def values(log, tag):
    return [(event.step, event.value) for event in log.Scalars(tag)]


def test_an_epoch_is_logged_with_its_means_and_its_images():
    with Log(Path("log"), 0, OPTIONS) as log:
        log.write(1, report(31.0), 0.5, 0.25)
    found = events("log")
    assert {tag: values(found, tag) for tag in found.Tags()["scalars"]} == {
        "train/loss": [(1, 0.5)],
        "train/learning_rate": [(1, 0.25)],
        "photos/psnr_y": [(1, 31.0)],
        "photos/psnr_rgb": [(1, 29.5)],
        "photos_psnr_y/a": [(1, 30.0)],
        "photos_psnr_y/b": [(1, 32.0)],
        "photos_psnr_rgb/a": [(1, 29.0)],
        "photos_psnr_rgb/b": [(1, 30.0)],
    }
    (event,) = found.Tensors("arguments/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 0
    assert "| lr | 0.002 |\n" in text
    assert "| train_data | photos |\n" in text
    assert text.count("\n") == 2 + len(OPTIONS.to_args())


def test_a_resumed_run_replaces_what_was_logged_after_its_epoch():
    for epochs, loss in (((1, 2, 3, 4, 5), 0.5), ((3, 4, 5, 6), 0.25)):
        with Log(Path("log"), epochs[0] - 1, OPTIONS) as log:
            for epoch in epochs:
                log.write(epoch, report(), loss, 0.25)
        time.sleep(1)  # TensorBoard reads files in the order of their names, which hold the second
    assert values(events("log"), "train/loss") == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25), (6, 0.25)]


def decoded(event):
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        return to_tensor(image.convert("RGB"))


def test_pictures_show_bicubic_network_and_ground_truth_and_the_filters():
    test_set, model = two_images(), small_run().model
    with Log(Path("log"), 0, OPTIONS) as log:
        log.write_pictures(7, model, test_set)
    found = events("log")
    names = [f"gradients/{name}: bicubic, SRCNN, ground truth" for name in ("linear", "radial")]
    assert set(found.Tags()["images"]) == {*names, "conv1/its 64 filters"}
    for name, image in zip(names, test_set.images.values(), strict=True):
        (event,) = found.Images(name)
        assert event.step == 7
        panels = [image.bicubic, to_tensor(Upscaler(model)(image.lr)), image.hr]
        for i, panel in enumerate(panels):  # each with a frame of 2 pixels
            shown = decoded(event)[:, 2:-2, 2 + i * 47 : 47 + i * 47]
            assert torch.equal(shown, panel)
    (event,) = found.Images("conv1/its 64 filters")
    shown = decoded(event)
    assert (shown / 255 - filters(model)).abs().max() < 0.01


def test_a_filter_is_shown_from_its_least_value_to_its_greatest():
    model = small_run().model
    sheet = filters(model)
    for i in (0, 17, 63):  # each 36 pixels wide with a frame of 2, 16 in a row
        top, left = (2 + 38 * n for n in divmod(i, 16))
        weight = model.conv1.weight[i].detach()
        wanted = (weight - weight.min()) / (weight.max() - weight.min())
        for corner in (0, 3):
            shown = sheet[:, top + corner : top + 36 : 4, left + corner : left + 36 : 4]
            assert (shown - wanted).abs().max() < 1e-4


def test_the_end_of_a_run_is_logged_with_its_options():
    """For TensorBoard's page that compares runs."""
    with Log(Path("log"), 0, OPTIONS) as log:
        log.write_result(4, report(31.0))
    found = events("log/end-4")
    for key, value in (("psnr_y", 31.0), ("psnr_rgb", 29.5)):
        assert [event.value for event in found.Scalars(f"final/{key}")] == [value]
    content = found.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["lr"].number_value == 0.002
    assert hparams["train_data"].string_value == "photos"


def write_everything(folder):
    with Log(folder, 0, OPTIONS) as log:
        for epoch in (1, 2):
            log.write(epoch, report(), 0.5, 0.25)
            log.write_pictures(epoch, small_run().model, two_images())
            log.write_result(epoch, report())


def test_without_a_folder_nothing_is_logged(tmp_path):
    write_everything(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [None, 0, 1, 5])
def test_a_log_that_cannot_be_written_is_one_warning(monkeypatch, capfd, room):
    """TensorBoard writes in a thread, whose error appears at a later call."""
    original, written = RecordWriter.write, []

    def write(self, record):
        written.append(record)
        if len(written) > room:
            raise OSError(28, "No space left on device")
        original(self, record)

    if room is None:
        Path("runs").write_text("in the way")
    monkeypatch.setattr(RecordWriter, "write", write)
    write_everything(Path("runs/log"))
    reason = "runs" if room is None else "No space left on device"
    assert_one_line(capfd.readouterr().err, "WARNING: TensorBoard's log cannot be written", reason)


def test_training_logs_every_epoch_and_goes_on_without_overlap_or_gap(train_small, photos, tmp_path):
    assert train_small("--num-epoch=3", "--save-freq=2")[0] == 0
    assert train_small(command=("resume", "checkpoint.2"))[0] == 0  # epoch 3 once more
    (run,) = (tmp_path / "runs").iterdir()
    found, name, mean = events(run), photos.name, load("checkpoint.3")["report"]["mean"]
    steps, psnr = zip(*values(found, f"{name}/psnr_y"), strict=True)
    assert steps == (1, 2, 3)
    assert psnr[-1] == pytest.approx(mean["psnr_y"])
    rates = [linear_schedule(0.003, 4 * epoch - 0.5, 12) for epoch in (1, 2, 3)]  # of each epoch's last step
    assert [rate for _, rate in values(found, "train/learning_rate")] == pytest.approx(rates)
    assert all([event.step for event in found.Images(tag)] == [1, 2, 3] for tag in found.Tags()["images"])
    assert values(events(run / "end-3"), "final/psnr_y")[0][1] == pytest.approx(mean["psnr_y"])

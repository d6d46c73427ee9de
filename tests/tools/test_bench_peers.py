import importlib
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, assert_one_line, in_new_process, trained_model

import train
from data import TestSet, load_images
from tools import bench_peers, measuring
from tools.bench_peers import PeerMeasurement, find_peers, open_vino, peer_table


def measure_small(folder):
    bench_peers.SIDE, measuring.REPETITIONS = 16, 1
    return bench_peers.measure_peers(folder, ["fp32"])


def test_runtimes_have_the_quality_of_this_project(photos, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    measurements = in_new_process(measure_small, photos)
    assert [m.name.partition(" ")[0] for m in measurements][:2] == ["this", "ONNX"]
    report = train.evaluate(trained_model(), TestSet(load_images(str(photos), "test"), 3))
    assert report.mean.srcnn.psnr_y > report.mean.bicubic.psnr_y + 0.5
    for m in measurements:
        assert m.psnr == pytest.approx(report.mean.srcnn.psnr_y, abs=0.01), m.name
        assert m.speed > 0


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16")])
def test_openvino_computes_in_given_precision_without_its_telemetry(tmp_path, monkeypatch, precision, hint):
    """On hardware that runs it faster, OpenVINO's default would be bf16."""

    def compile_model(file, device, options):
        assert (file, device, options["INFERENCE_PRECISION_HINT"]) == (str(tmp_path / "net.onnx"), "CPU", hint)
        with pytest.raises(ImportError):
            importlib.import_module("openvino_telemetry")
        return lambda x: [2 * x]

    core = SimpleNamespace(compile_model=compile_model)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # to be restored
    del sys.modules["openvino_telemetry"]
    assert open_vino(tmp_path / "net.onnx", precision)(4) == 8


def test_workloads_count_hr_pixels(monkeypatch):
    monkeypatch.setattr(bench_peers, "SIDE", 5)
    assert bench_peers.our_workload("fp32")() == bench_peers.peer_workload(lambda: lambda x: x)() == 225


def test_without_test_set_there_is_no_psnr(monkeypatch):
    for name, result in {"find_peers": [], "measure_interleaved": {("this project", "fp32"): (7.5, 60)}}.items():
        monkeypatch.setattr(bench_peers, name, lambda *_, result=result: result)
    row = PeerMeasurement("this project", "fp32", "image to image", 7.5, None)
    assert bench_peers.measure_peers(None, ["fp32"]) == [row]


@pytest.mark.parametrize(
    ("missing", "found"),
    [
        ([], ["ONNX Runtime 1.2 fp32", "OpenVINO 1.2 fp32", "OpenVINO 1.2 bf16"]),
        (["openvino"], ["ONNX Runtime 1.2 fp32"]),
        (["onnxruntime"], ["OpenVINO 1.2 fp32", "OpenVINO 1.2 bf16"]),
        (["onnxscript"], []),
        (["onnxruntime", "openvino"], []),
    ],
)
def test_runtimes_that_are_not_installed_are_left_out(tmp_path, monkeypatch, capsys, missing, found):
    monkeypatch.setattr(bench_peers, "installed_version", lambda package: None if package in missing else "1.2")
    peers = find_peers(tmp_path / "net.onnx", ["fp32", "bf16"])
    assert [f"{peer.name} {peer.precision}" for peer in peers] == found
    err = capsys.readouterr().err
    if missing:
        assert_one_line(err, " and ".join(missing), "pip install onnxruntime onnxscript openvino")
    else:
        assert err == ""


def test_version_of_packages():
    assert bench_peers.installed_version("torch")[0].isdigit()
    assert bench_peers.installed_version("no-such-package") is None


def test_table_of_peers_has_the_columns_of_the_docs():
    a = PeerMeasurement("OpenVINO 2026.4.1", "bf16", "three convolutions", 23.756, 26.9483)
    head, line, *rows = peer_table("Set5", [a, a._replace(psnr=None)])
    assert f"\n{head}\n{line}\n" in (ROOT / "docs" / "speed.md").read_text("utf-8")
    start = "| OpenVINO 2026.4.1 | bf16 | three convolutions | 23.76 |"
    assert rows == [f"{start} 26.948 dB |", f"{start} n/a |"]

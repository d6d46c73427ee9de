"""The ONNX export in docs/onnx.md."""

import re

import pytest
import torch
from helpers import ROOT, trained_model


def test_exported_network_computes_same_function():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/onnx.md").read_text("utf-8"), re.S)
    exec(code, {})
    session = runtime.InferenceSession("srcnn.onnx")
    torch.manual_seed(0)
    for size in ((24, 16), (9, 31)):
        lr = torch.rand(1, 3, *size)
        (sr,) = session.run(None, {"lr": lr.numpy()})
        assert torch.allclose(torch.from_numpy(sr), trained_model().double()(lr.double()).float(), atol=1e-4)

"""The export that docs/onnx.md shows computes what the network does."""

import re

import pytest
import torch
from helpers import ROOT, trained_model


def test_the_exported_network_is_the_network():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/onnx.md").read_text(), re.S)
    exec(code, {})
    session = runtime.InferenceSession("srcnn.onnx")
    for size in ((24, 16), (9, 31)):
        lr = torch.rand(1, 3, *size)
        (sr,) = session.run(None, {"lr": lr.numpy()})
        assert torch.allclose(torch.from_numpy(sr), trained_model()(lr), atol=1e-4)

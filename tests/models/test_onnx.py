"""PyTorch's own ONNX exporter takes pruned models; `make runtimes` runs this where ONNX Runtime is installed."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner


onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make runtimes")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: make runtimes")


class Logits(torch.nn.Module):
    """Tokens in, logits out: without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama_gqa_biases", "mistral_sliding_window", "opt_pre_norm", "bloom", "qwen3"])
def test_onnx_runtime_computes_what_transformers_does(name, tokens, tmp_path):
    """At sizes of batch and text other than those that it was exported with."""
    model = FwdPruner(tiny.make_model(name)).prune(tiny.request(sparsity=0.4, scope="global"), tokens).eval()
    any_size = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    wrapped = Logits(model).eval()
    program = torch.onnx.export(wrapped, (tokens[:2],), dynamo=True, dynamic_shapes=any_size, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": tokens[:3, :11].numpy()})
    with torch.no_grad():
        expected = model(tokens[:3, :11]).logits

    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)

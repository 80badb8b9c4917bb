"""Exports of models with offloaded layers are those of the same models in memory."""

import pytest
import tiny
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.export import export_gguf, export_stock
from optimum_fwdprune.loading.offloading import is_offloaded


REQUEST = {"method": "magnitude", "reconstruction": "none", "sparsity": 0.3, "layout": "stock", "kinds": ["mlp"]}
ARCHITECTURES = ["llama_gqa_biases", "llama_mha_tied"]


@pytest.fixture(params=["cpu_offload", "disk_offload", "low_memory"])
def offloaded(request, tmp_path):
    """A function that prunes a model whose layers are offloaded, and returns it."""

    def prune(name):
        model = tiny.make_model(name)
        if request.param == "low_memory":
            model.save_pretrained(tmp_path / "dense")
            pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
        else:
            places = {"cpu_offload": [], "disk_offload": [tmp_path / "offloaded"]}[request.param]
            offload = {"cpu_offload": cpu_offload, "disk_offload": disk_offload}[request.param]
            pruner = FwdPruner(offload(model, *places, torch.device("cpu")))
        return pruner.prune(tiny.request(**REQUEST))

    return prune


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stock_checkpoints_of_offloaded_models_hold_their_weights(name, offloaded, tokens, tmp_path):
    expected = FwdPruner(tiny.make_model(name)).prune(tiny.request(**REQUEST))
    model = offloaded(name)
    assert is_offloaded(model)
    export_stock(model, None, tmp_path / "stock")

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert not type(loaded).__name__.startswith("Pruned")
    assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
    assert loaded.dtype == torch.float32
    # One file for every layer, and one for the rest.
    files = sorted((tmp_path / "stock").glob("*.safetensors"))
    assert len(files) == 4 and not any(name.startswith("model.layers.1.") for name in load_file(files[1]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_files_of_offloaded_models_are_those_of_models_in_memory(name, offloaded, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    expected = FwdPruner(tiny.make_model(name)).prune(tiny.request(**REQUEST))
    export_gguf(expected, tokenizer, tmp_path / "a" / "model.gguf", dtype="f32", pre_tokenizer="gpt-2")
    model = offloaded(name)
    assert is_offloaded(model)
    model.config._name_or_path = expected.config._name_or_path
    export_gguf(model, tokenizer, tmp_path / "b" / "model.gguf", dtype="f32", pre_tokenizer="gpt-2")

    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()

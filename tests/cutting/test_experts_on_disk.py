"""Mixtures that are read, cut and written layer by layer, with one tensor per expert in their files."""

import gc
import json

import pytest
import tiny_mixtures
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner


# With heads in addition, the model is of a pruned class.
REQUESTS = {"mixtral": {"kinds": ["expert", "attention"], "sparsity": 0.5, "attention_unit": "kv_group"}}


def stored(folder):
    """Every tensor of a checkpoint, by its name in the files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_mixture_on_disk_is_pruned_bit_for_bit_as_in_memory(name, tokens, tmp_path):
    tiny_mixtures.make_mixture(name).save_pretrained(tmp_path / "dense")
    before = set(tmp_path.iterdir())
    for low_memory in (False, True):
        options = {"low_memory": True, "offload_folder": tmp_path / "work"} if low_memory else {}
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", **options)
        pruner.prune(None, tokens, **REQUESTS.get(name, {"kinds": ["expert"], "sparsity": 0.5}))
        pruner.save_pretrained(tmp_path / str(low_memory))
    in_memory, on_disk = (stored(tmp_path / str(low_memory)) for low_memory in (False, True))

    assert in_memory.keys() == on_disk.keys()
    assert all(torch.equal(tensor, on_disk[tensor_name]) for tensor_name, tensor in in_memory.items())
    index = json.loads((tmp_path / "True" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == on_disk.keys()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    with torch.no_grad():
        assert torch.equal(
            reloaded(tokens).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "False")(tokens)[0]
        )
    # The copies of the weights are removed with the model.
    del pruner
    gc.collect()
    left = {path for path in (tmp_path / "work").iterdir() if any(path.iterdir())}
    assert not left and set(tmp_path.iterdir()) - before == {tmp_path / place for place in ("False", "True", "work")}


def test_an_interrupted_run_resumes_with_the_same_result(tokens, tmp_path, monkeypatch):
    tiny_mixtures.make_mixture("mixtral").save_pretrained(tmp_path / "dense")
    request = {"kinds": ["expert"], "sparsity": 0.5, "resume": str(tmp_path / "states"), "resume_seconds": 0.0}
    whole = FwdPruner(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    whole.prune(None, tokens, kinds=["expert"], sparsity=0.5)

    from optimum_fwdprune.reconstruction import layer_fit

    fits, fit = [], layer_fit.refit_experts

    def interrupted(*arguments):
        fits.append(arguments[0].key)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(layer_fit, "refit_experts", interrupted)
    for attempt in range(2):
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
        if attempt == 0:
            with pytest.raises(KeyboardInterrupt):
                pruner.prune(None, tokens, **request)
        else:
            pruner.prune(None, tokens, **request)

    assert [str(key) for key in fits] == ["0.expert", "1.expert", "2.expert", "2.expert"]
    pruner.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in whole.model.state_dict().items())

"""Models that accelerate has dispatched, with layers on disk or offloaded: the plan and weights that memory gives."""

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.loading.offloading import is_offloaded, read_parameter


# Noise is added to the outputs of a linear that is not in memory, and to its weights otherwise; a slope is the
# difference of two losses, which amplifies what rounding makes of that.
ROUNDING = 1e-3

# Everything that runs whole models, and what runs layer by layer.
CASES = {
    "wanda_sp": {},
    "flap": {"method": "flap", "scope": "global"},
    "mini_llm of weights": {"method": "mini_llm", "draws": 3},
    "mini_llm of units": {"method": "mini_llm", "draws": 12, "perturb": "units", "reconstruction": "none"},
    "mini_llm against ones": {"method": "mini_llm", "gradient": "ones", "reconstruction": "none"},
    "policy_gradient of ratios": {"method": "policy_gradient", "steps": 3, "learning_rate": 0.1},
    "policy_gradient of units": {"method": "policy_gradient", "steps": 3, "parametrization": "unit"},
    "search": {"scope": "search", "search_windows": 80, "budget": "joint"},
    "search without reconstruction": {"scope": "search", "search_windows": 80, "reconstruction": "none"},
    "search with biases": {"scope": "search", "search_windows": 80, "reconstruction": "bias"},
    "rounds": {"rounds": 2},
    "sources": {"refit_sources": True, "ridge": 3.0, "kinds": ["mlp"], "sparsity": 0.3},
}


def mapped(model, folder):
    """The first layer in memory, the others on disk."""
    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADING = {
    "device_map": mapped,
    "cpu_offload": lambda model, _folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
}


@pytest.fixture(scope="module")
def alone():
    """What a model in memory ends with, made when it is asked for."""
    made = {}

    def prune(name, fields, tokens):
        if name not in made:
            made[name] = FwdPruner(tiny.make_model("llama_gqa_biases"))
            made[name].prune(request_of(fields), tokens)
        return made[name]

    return prune


def request_of(fields):
    share = {} if "target_speedup" in fields else {"sparsity": 0.4}
    return tiny.request(**{**share, "seed": 3, **fields})


# Layers in memory and on disk with every case, and with the cases in turn what offloads a whole model.
PLACED = [("device_map", name) for name in CASES]
PLACED += [(("cpu_offload", "disk_offload")[number % 2], name) for number, name in enumerate(CASES)]


@pytest.mark.parametrize(("offloading", "name"), PLACED)
def test_dispatched_models_end_where_those_in_memory_do(name, offloading, tokens, tmp_path, alone):
    model = OFFLOADING[offloading](tiny.make_model("llama_gqa_biases"), tmp_path)
    assert is_offloaded(model)
    expected, found = alone(name, CASES[name], tokens), FwdPruner(model)
    found.prune(request_of(CASES[name]), tokens)

    for key, values in expected.scores.values.items():
        torch.testing.assert_close(found.scores.values[key], values, rtol=ROUNDING, atol=1e-5)
    assert found.plan.kept == expected.plan.kept
    for parameter, value in expected.model.named_parameters():
        torch.testing.assert_close(read_parameter(found.model, parameter), value, rtol=5e-3, atol=5e-4)
    torch.testing.assert_close(found.model(tokens).logits, expected.model(tokens).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fields", [{"method": "taylor"}, {"method": "mini_llm", "gradient": "exact"}])
def test_back_propagation_is_refused_before_anything_runs(fields, tokens, tmp_path):
    model = disk_offload(tiny.make_model("llama_gqa_biases"), tmp_path, torch.device("cpu"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"is impossible with offloaded weights\. Load the model without offloading"):
        FwdPruner(model).prune(request_of(fields), tokens)


def test_layers_are_not_timed_where_they_do_not_lie(tokens):
    model = cpu_offload(tiny.make_model("llama_gqa_biases"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"parts of this model are offloaded\. Load it without device_map"):
        FwdPruner(model).prune(request_of({"target_speedup": 1.1, "latency_tokens": 16}), tokens)

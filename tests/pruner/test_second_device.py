"""Models on an emulated accelerator, split over two, and offloaded from it end where models on the CPU do."""

import errno

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from second_device import FIRST, REQUESTS, SECOND, request_of
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.evaluation import benchmark, perplexity
from optimum_fwdprune.export import export_gguf, export_stock
from optimum_fwdprune.loading import dispatching
from optimum_fwdprune.loading.dispatching import PlacementError
from optimum_fwdprune.loading.offloading import is_offloaded, lies_on_disk, read_parameter
from optimum_fwdprune.planning import timing
from optimum_fwdprune.runs.devices import has_float64


# Requests that back-propagate, through whole models or through one layer.
THROUGH_MODELS = {"taylor", "mini_llm exact"}
# Noise is added to the outputs of a linear that is not in memory, and to its weights otherwise; a slope is the
# difference of two losses, which amplifies what rounding makes of that.
ROUNDING = {"rtol": 5e-3, "atol": 5e-4}
ARCHITECTURE = "llama_gqa_biases"


def mapped(model, folder, *places):
    """Dispatch the layers of `model` to these places, and all else to the first device."""
    names = [name for name, _ in get_architecture(model.config).layers(model)]
    container = names[0].rpartition(".")[0]
    device_map = dict(zip(names, places))
    for name, module in model.named_modules():
        if name == "" or container.startswith(f"{name}."):
            children = (f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
            device_map |= {child: FIRST for child in children if not f"{container}.".startswith(f"{child}.")}
    # accelerate tells tied weights by their addresses, which are used again for others once these are moved away.
    model.get_input_embeddings().to(FIRST)
    model.tie_weights()
    return dispatch_model(model, device_map, main_device=FIRST, offload_dir=folder, force_hooks=True)


PLACEMENTS = {
    "one": lambda model, _folder: model.to(FIRST),
    "two": lambda model, folder: mapped(model, folder, FIRST, SECOND, SECOND),
    "cpu": lambda model, folder: mapped(model, folder, FIRST, "cpu", "cpu"),
    "disk": lambda model, folder: mapped(model, folder, FIRST, "disk", "disk"),
    "cpu_offload": lambda model, _folder: cpu_offload(model, torch.device(FIRST)),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device(FIRST)),
}


@pytest.fixture(scope="module")
def on_the_cpu():
    """What a model on the CPU ends with, made when it is asked for."""
    made = {}

    def prune(architecture, name, tokens):
        if (architecture, name) not in made:
            pruner = FwdPruner(tiny.make_model(architecture), tiny.make_tokenizer())
            pruner.prune(request_of(name), None if name == "self" else tokens)
            made[architecture, name] = pruner
        return made[architecture, name]

    return prune


def parameters_of(model):
    return {name: read_parameter(model, name).detach().cpu() for name, _ in model.named_parameters()}


def places_of(model):
    """Where every parameter lies, and the hooks of every module."""
    hooks = {
        name: repr(module._hf_hook) if hasattr(module, "_hf_hook") else None for name, module in model.named_modules()
    }
    return {name: str(parameter.device) for name, parameter in model.named_parameters()}, hooks


def check_request(architecture, name, placement, tokens, tmp_path, on_the_cpu):
    model = PLACEMENTS[placement](tiny.make_model(architecture), tmp_path)
    places, device_map = places_of(model), getattr(model, "hf_device_map", None)
    refused = is_offloaded(model) and name in {*THROUGH_MODELS, "target speedup"}
    if refused or (lies_on_disk(model) and name == "self"):
        with pytest.raises(ValueError, match=r"offload|from disk"):
            FwdPruner(model).prune(request_of(name), None if name == "self" else tokens)
        return
    expected, pruner = on_the_cpu(architecture, name, tokens), FwdPruner(model, tiny.make_tokenizer())
    pruner.prune(request_of(name), None if name == "self" else tokens)

    assert pruner.plan.kept == expected.plan.kept
    weights = parameters_of(pruner.model)
    for parameter, value in expected.model.named_parameters():
        torch.testing.assert_close(weights[parameter], value.detach(), **ROUNDING)
    logits = pruner.model(tokens.to(FIRST)).logits.cpu()
    torch.testing.assert_close(logits, expected.model(tokens).logits, rtol=1e-2, atol=1e-2)
    now_places, now_hooks = places_of(pruner.model)
    assert now_hooks == places[1]
    assert {place: now_places[place] for place in places[0]} == places[0]
    assert getattr(pruner.model, "hf_device_map", None) == device_map


# They change which units stay, which is settled on the CPU: enough that they run on one device.
ON_ONE_DEVICE = {"random", "KV groups", "multiple_of"}
# All other requests on the two placements that differ most from the CPU, and one of every kind on the others.
FEW = [
    "sequential",
    "independent",
    "refit sources",
    "flap global",
    "mini_llm ones",
    "mini_llm exact",
    "rounds",
    "self",
]
MANY = [name for name in REQUESTS if name not in ON_ONE_DEVICE]
CASES = [(placement, name) for placement in PLACEMENTS for name in (MANY if placement in ("two", "cpu") else FEW)]


@pytest.mark.parametrize(("placement", "name"), CASES)
def test_every_request_ends_where_it_does_on_the_cpu(placement, name, device, tokens, tmp_path, on_the_cpu):
    check_request(ARCHITECTURE, name, placement, tokens, tmp_path, on_the_cpu)


# Biases and ALiBi, fused sources, and positions that only the embeddings know.
@pytest.mark.parametrize("architecture", ["bloom", "opt_pre_norm"])
@pytest.mark.parametrize(("placement", "name"), [("two", "refit sources"), ("cpu", "flap global"), ("disk", "rounds")])
def test_other_layouts_end_where_they_do_on_the_cpu(
    architecture, placement, name, device, tokens, tmp_path, on_the_cpu
):
    check_request(architecture, name, placement, tokens, tmp_path, on_the_cpu)


@pytest.mark.parametrize("name", ["none", "bias", "sequential", "independent", "refit sources", "mini_llm ones"])
def test_models_with_low_memory_compute_on_the_accelerator(name, device, tokens, tmp_path, on_the_cpu):
    tiny.make_model(ARCHITECTURE).save_pretrained(tmp_path / "dense")
    pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
    assert str(pruner.model.device) == FIRST and is_offloaded(pruner.model)
    pruner.prune(request_of(name), tokens)

    expected = on_the_cpu(ARCHITECTURE, name, tokens)
    assert pruner.plan.kept == expected.plan.kept
    assert str(pruner.model.device) == FIRST and is_offloaded(pruner.model)
    logits = pruner.model(tokens.to(FIRST)).logits.cpu()
    torch.testing.assert_close(logits, expected.model(tokens).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_default_dtype_changes_nothing(name, tokens, on_the_cpu, monkeypatch):
    monkeypatch.setattr(timing, "median_seconds", tiny.counted_seconds)
    expected = on_the_cpu(ARCHITECTURE, name, tokens)
    pruner = FwdPruner(tiny.make_model(ARCHITECTURE), tiny.make_tokenizer())
    torch.set_default_dtype(torch.bfloat16)
    try:
        pruner.prune(request_of(name), None if name == "self" else tokens)
    finally:
        torch.set_default_dtype(torch.float32)

    assert pruner.plan.kept == expected.plan.kept
    for parameter, value in expected.model.named_parameters():
        assert torch.equal(pruner.model.get_parameter(parameter), value)


@pytest.mark.parametrize("name", FEW)
def test_the_default_device_changes_nothing(name, device, tokens, on_the_cpu):
    expected = on_the_cpu(ARCHITECTURE, name, tokens)
    pruner = FwdPruner(tiny.make_model(ARCHITECTURE).to(FIRST), tiny.make_tokenizer())
    with torch.device(FIRST):
        pruner.prune(request_of(name), None if name == "self" else tokens)

    assert pruner.plan.kept == expected.plan.kept


@pytest.mark.parametrize("name", REQUESTS)
def test_a_device_without_float64_ends_where_the_cpu_does(name, device, tokens, tmp_path, on_the_cpu):
    device.refuses_float64 = True
    check_request(ARCHITECTURE, name, "one", tokens, tmp_path, on_the_cpu)


@pytest.mark.parametrize("placement", ["two", "cpu", "disk", "cpu_offload", "disk_offload"])
def test_a_copy_is_placed_as_the_dense_model_which_stays_whole(placement, device, tokens, tmp_path, on_the_cpu):
    model = PLACEMENTS[placement](tiny.make_model(ARCHITECTURE), tmp_path)
    before, places = model(tokens.to(FIRST)).logits.cpu(), places_of(model)
    pruner = FwdPruner(model)
    pruned = pruner.prune(request_of("sequential"), tokens, inplace=False)

    expected = on_the_cpu(ARCHITECTURE, "sequential", tokens).model
    torch.testing.assert_close(pruned(tokens.to(FIRST)).logits.cpu(), expected(tokens).logits, rtol=1e-2, atol=1e-2)
    assert torch.equal(model(tokens.to(FIRST)).logits.cpu(), before)
    assert places_of(model) == places and places_of(pruned)[1] == places[1]


@pytest.mark.parametrize("placement", ["cpu", "disk", "cpu_offload", "disk_offload"])
def test_a_pruned_model_that_cannot_be_placed_is_kept(placement, device, tokens, tmp_path, on_the_cpu, monkeypatch):
    model = PLACEMENTS[placement](tiny.make_model(ARCHITECTURE), tmp_path)

    def fail(*_args, **_kwargs):
        raise RuntimeError("Out of memory.")

    for name in ("dispatch_model", "cpu_offload", "disk_offload"):
        monkeypatch.setattr(dispatching, name, fail)
    pruner = FwdPruner(model)
    with pytest.raises(PlacementError, match=r"is complete, but could not be distributed .*: Out of memory\."):
        pruner.prune(request_of("none"), tokens)

    assert pruner.plan.kept == on_the_cpu(ARCHITECTURE, "none", tokens).plan.kept
    monkeypatch.undo()
    for name, value in on_the_cpu(ARCHITECTURE, "none", tokens).model.named_parameters():
        parameter = pruner.model.get_parameter(name)
        assert parameter.shape == value.shape
        assert parameter.is_meta or torch.equal(parameter.cpu(), value)


@pytest.mark.parametrize("placement", ["disk", "disk_offload"])
def test_a_full_disk_leaves_the_dense_model_whole(placement, device, tokens, tmp_path, monkeypatch):
    model = PLACEMENTS[placement](tiny.make_model(ARCHITECTURE), tmp_path)
    before, written = model(tokens.to(FIRST)).logits.cpu(), []

    def save(file, tensors):
        written.append(file)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dispatching, "save_weights_atomically", save)
    pruner = FwdPruner(model)
    with pytest.raises(OSError, match="There is no room"):
        pruner.prune(request_of("none"), tokens)

    assert pruner.model is model and torch.equal(model(tokens.to(FIRST)).logits.cpu(), before)
    assert not written[0].parent.exists()


def test_a_full_device_is_not_taken_for_one_without_float64(device, monkeypatch):
    with monkeypatch.context() as full:

        def fail(*_args, **_options):
            raise torch.OutOfMemoryError("Out of memory.")

        full.setattr(torch, "ones", fail)
        with pytest.raises(torch.OutOfMemoryError):
            has_float64(torch.device(FIRST))

    assert has_float64(torch.device(FIRST))


@pytest.mark.parametrize("placement", ["one", "two"])
def test_pruned_models_are_measured_on_the_device(placement, device, tokens, tokenizer, tmp_path, on_the_cpu):
    model = PLACEMENTS[placement](tiny.make_model(ARCHITECTURE), tmp_path)
    pruned = FwdPruner(model).prune(request_of("sequential"), tokens)
    expected = on_the_cpu(ARCHITECTURE, "sequential", tokens).model

    assert perplexity(pruned, tokens) == pytest.approx(perplexity(expected, tokens), rel=1e-3)
    (measured,) = benchmark([pruned], prompt_tokens=(8,), new_tokens=2, repeats=1)
    assert measured.parameters == sum(parameter.numel() for parameter in expected.parameters())


@pytest.mark.parametrize("placement", ["one", "two", "cpu", "disk_offload"])
def test_pruned_models_are_saved_and_exported_from_the_device(placement, device, tokens, tokenizer, tmp_path):
    fields = {"layout": "stock", "kinds": ["mlp"]}
    model = PLACEMENTS[placement](tiny.make_model(ARCHITECTURE), tmp_path / "offloaded")
    pruner = FwdPruner(model, tokenizer)
    pruner.prune(request_of("magnitude", **fields), tokens)
    expected = pruner.model(tokens.to(FIRST)).logits.cpu()
    pruner.save_pretrained(tmp_path / "saved")
    export_stock(pruner.model, tokenizer, tmp_path / "stock")
    export_gguf(pruner.model, tokenizer, tmp_path / "model.gguf", pre_tokenizer="gpt-2")

    for folder in ("saved", "stock"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(loaded(tokens).logits, expected)

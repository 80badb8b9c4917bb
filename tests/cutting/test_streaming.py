"""Models that stay on disk: the same plan and the same weights as in memory, one layer in memory at a time."""

import copy
import gc
import json
import os
import signal

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.forward.layerwise import decoder_layers
from optimum_fwdprune.loading.offloading import (
    InTurn,
    is_offloaded,
    read_parameter,
    resident,
)
from optimum_fwdprune.runs.shelves import Shelf


REQUESTS = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude", "scope": "global"},
    "flap": {"method": "flap", "scope": "global", "budget": "joint"},
    "wanda_sp": {"method": "wanda_sp", "reconstruction": "none"},
    "independent": {"reconstruction": "least_squares", "reconstruction_order": "independent"},
    "layer": {"reconstruction": "least_squares", "reconstruction_target": "layer"},
    "sequential": {"reconstruction": "least_squares", "skip_layers": [0]},
    "sources": {
        "reconstruction": "least_squares",
        "kinds": ["mlp"],
        "sparsity": 0.3,
        "refit_sources": True,
        "ridge": 3.0,
    },
}


def weights_of(folder):
    """Everything in the weight files of a checkpoint, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def json_of(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture
def checkpoint(dense, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def llama(tmp_path):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


# All requests with one layout, and with the others one that reconstructs layer by layer.
CASES = [
    (architecture, name)
    for architecture in (*tiny.REPRESENTATIVE, "phi3", "falcon_grouped")
    for name in (REQUESTS if architecture == tiny.REPRESENTATIVE[0] else ("sequential",))
]


@pytest.mark.parametrize(("architecture_name", "name"), CASES)
def test_streamed_equals_in_memory_bit_for_bit(checkpoint, tokens, tmp_path, name):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    for folder in (memory, disk):
        pruner = FwdPruner.from_pretrained(checkpoint, low_memory=folder == disk)
        pruner.prune(tiny.request(**{"sparsity": 0.4, **REQUESTS[name]}), tokens)
        pruner.save_pretrained(folder)
        assert is_offloaded(pruner.model) == (folder == disk)
        assert pruner.report.masked_difference < 1e-4
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(pruner.model(tokens).logits, reloaded(tokens).logits)
    expected, found = weights_of(memory), weights_of(disk)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    for file in ("fwdprune_plan.json", "config.json", "generation_config.json"):
        assert json_of(disk, file) == json_of(memory, file)


@torch.no_grad()
@pytest.mark.parametrize("copied", [False, True])
def test_the_model_keeps_its_files_as_long_as_it_lives(llama, tokens, tokenizer, tmp_path, copied):
    # The warning that there is none would be recorded, and with it the error and all that its frames hold.
    tokenizer.save_pretrained(llama)
    work = tmp_path / "work"
    pruner = FwdPruner.from_pretrained(llama, low_memory=True, offload_folder=work)
    model = pruner.prune(tiny.request(method="magnitude", reconstruction="none", sparsity=0.4))
    expected = model(tokens).logits
    if copied:
        model = copy.deepcopy(model)
    del pruner
    gc.collect()

    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(tokens).logits, expected)
    del model
    gc.collect()
    assert not list(work.glob(".fwdprune-*"))


def test_the_attention_implementation_stays(llama):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True, attn_implementation="eager")
    model = pruner.prune(tiny.request(method="magnitude", reconstruction="none", sparsity=0.4))

    assert model.config._attn_implementation == "eager"
    assert {layer.self_attn.config._attn_implementation for layer in decoder_layers(model)} == {"eager"}


def test_a_config_that_ties_what_the_checkpoint_has_apart_is_refused(llama):
    config = json_of(llama, "config.json")
    (llama / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    pruner = FwdPruner.from_pretrained(llama, low_memory=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True.*two tensors"):
        pruner.prune(tiny.request(method="magnitude", reconstruction="none"))


def test_one_layer_at_a_time_is_in_memory(llama, tokens, monkeypatch):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True)
    layers = decoder_layers(pruner.model)
    # None of them where windows are only embedded, up to the first.
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: seen.append([not is_offloaded(each) for each in layers]))
    pruner.prune(tiny.request(sparsity=0.4), tokens)

    assert {sum(in_memory) for in_memory in seen} == {0, 1}


def test_a_resident_layer_is_read_once_and_gone_afterwards(llama, tokens):
    model = FwdPruner.from_pretrained(llama, low_memory=True).model
    dense = AutoModelForCausalLM.from_pretrained(llama)
    (layer, *others), expected = decoder_layers(model), decoder_layers(dense)[0]
    with resident(layer):
        with resident(layer):
            pass
        first = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)
        for name, parameter in layer.named_parameters():
            assert parameter.data_ptr() == first[name]
            assert torch.equal(parameter, expected.get_parameter(name))
        assert all(map(is_offloaded, others))
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_iterating_over_sites_has_each_in_memory(llama):
    model = FwdPruner.from_pretrained(llama, low_memory=True).model
    for site in InTurn(find_sites(model)):
        assert not site.projection.weight.is_meta
        assert not any(coupling.linear.weight.is_meta for coupling in site.couplings)
    assert all(site.projection.weight.is_meta for site in find_sites(model))


def test_a_pruned_checkpoint_is_pruned_again_from_disk(llama, tokens, tmp_path):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True)
    request = tiny.request(method="magnitude", sparsity=0.2)
    pruner.prune(request)
    pruner.prune(request)
    pruner.save_pretrained(tmp_path / "twice")
    again = FwdPruner.from_pretrained(llama)
    again.prune(request)
    expected = again.prune(request)

    for name, tensor in weights_of(tmp_path / "twice").items():
        assert torch.equal(tensor, expected.get_parameter(name))


@pytest.mark.parametrize("option", [{"scope": "search"}, {"rounds": 2}, {"target_speedup": 1.2}], ids=str)
def test_what_runs_whole_models_is_refused_before_anything_is_read(llama, tokens, option):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True)
    with pytest.raises(ValueError, match=rf"{next(iter(option))}.*one decoder layer in memory"):
        pruner.prune(tiny.request(**option), tokens)


def test_text_is_not_written_by_a_model_on_disk(llama):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True)
    with pytest.raises(ValueError, match=r"'self'.*every token"):
        pruner.prune(tiny.request(calibration="self"))


@pytest.mark.parametrize("option", [{"device_map": "cpu"}, {"gguf_file": "model.gguf"}], ids=str)
def test_what_contradicts_low_memory_is_refused(llama, option):
    with pytest.raises(ValueError, match="leave out gguf_file and device_map"):
        FwdPruner.from_pretrained(llama, low_memory=True, **option)


def killed_at(shelf_writes, work):
    """Run `work` in a child that is killed when it puts something aside for the so many-th time; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            countdown = iter(range(shelf_writes))
            put = Shelf.__setitem__

            def put_or_die(shelf, name, tensor):
                if next(countdown, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                put(shelf, name, tensor)

            Shelf.__setitem__ = put_or_die
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("name", "puts"), [("independent", 11), ("sequential", 17)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(llama, tokens, tmp_path, name, puts):
    def prune(folder, **options):
        pruner = FwdPruner.from_pretrained(llama, low_memory=True)
        pruner.prune(tiny.request(sparsity=0.4, batch_size=16, **REQUESTS[name], **options), tokens)
        pruner.save_pretrained(folder)

    state = {"resume": str(tmp_path / "state")}
    prune(tmp_path / "expected")
    killed = 0
    # Enough for the start and one layer, so every run gets further.
    while killed_at(puts, lambda: prune(tmp_path / "found", **state)):
        assert not (tmp_path / "found").exists() and killed < 20
        killed += 1

    assert killed >= 2
    expected, found = weights_of(tmp_path / "expected"), weights_of(tmp_path / "found")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert json_of(tmp_path / "found", "fwdprune_plan.json") == json_of(tmp_path / "expected", "fwdprune_plan.json")


def test_what_was_put_aside_for_another_run_is_refused(llama, tokens, tmp_path):
    request = {"method": "wanda_sp", "sparsity": 0.4, "resume": str(tmp_path / "state")}
    FwdPruner.from_pretrained(llama, low_memory=True).prune(tiny.request(**request), tokens)
    with pytest.raises(ValueError, match=r"belongs to another run: its ridge is None, this one's is 0.1"):
        FwdPruner.from_pretrained(llama, low_memory=True).prune(tiny.request(**request, ridge=0.1), tokens)


def changed_by_hand(model):
    model.lm_head.weight.data[3] = 7.0


def loaded_state(model):
    model.load_state_dict({"model.norm.weight": torch.full_like(model.model.norm.weight, 0.5)}, strict=False)


def changed_config(model):
    model.config.pad_token_id = 9
    model.generation_config.max_new_tokens = 11


def another_dtype(model):
    model.bfloat16()


def a_layer_in_memory(model):
    from accelerate.hooks import remove_hook_from_module

    layer = decoder_layers(model)[1]
    with resident(layer):
        weights = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    remove_hook_from_module(layer, recurse=True)
    for name, value in weights.items():
        parent, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent), leaf, torch.nn.Parameter(value * 1.5))


CHANGES = [changed_by_hand, loaded_state, changed_config, another_dtype, a_layer_in_memory]
CUT = {"method": "magnitude", "kinds": ["attention", "mlp"], "reconstruction": "none", "sparsity": 0.4}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("opened", ["dense", "pruned"])
def test_what_is_saved_is_what_the_model_is(llama, tokens, tmp_path, change, opened):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True)
    pruner.prune(**CUT)
    if opened == "pruned":
        pruner.save_pretrained(tmp_path / "pruned")
        pruner = FwdPruner.from_pretrained(tmp_path / "pruned", low_memory=True)
    change(pruner.model)
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    state = pruner.model.state_dict()
    for name, value in loaded.state_dict().items():
        held = state[name]
        held = held if not held.is_meta else read_parameter(pruner.model, name).to(held.dtype)
        assert torch.equal(value, held), name
    assert loaded.config.pad_token_id == pruner.model.config.pad_token_id
    assert loaded.generation_config.max_new_tokens == pruner.model.generation_config.max_new_tokens


def test_files_of_layers_on_disk_are_not_written_twice(llama, tmp_path):
    pruner = FwdPruner.from_pretrained(llama, low_memory=True, offload_folder=tmp_path)
    pruner.prune(**CUT)
    pruner.save_pretrained(tmp_path / "out")
    links = {file.name: file.stat().st_nlink for file in (tmp_path / "out").glob("*.safetensors")}

    assert links == {f"model-{number:05d}-of-00004.safetensors": 1 + (number > 1) for number in range(1, 5)}


@torch.no_grad()
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_models_offloaded_after_pruning_are_saved(llama, tokens, tmp_path, offload):
    pruner = FwdPruner.from_pretrained(llama)
    pruner.prune(**CUT)
    expected = pruner.model(tokens).logits
    folder = {"offload_dir": tmp_path / "offloaded"} if offload is disk_offload else {}
    pruner.model = offload(pruner.model, execution_device=torch.device("cpu"), **folder)
    pruner.save_pretrained(tmp_path / "out")

    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, expected)


def test_dropout_of_a_config_does_not_disturb_the_check(tokens, tmp_path):
    tiny.make_model("opt_pre_norm", dropout=0.5).save_pretrained(tmp_path)
    for training in (False, True):
        pruner = FwdPruner.from_pretrained(tmp_path, low_memory=True)
        pruner.model.train(training)
        pruner.prune(tiny.request(sparsity=0.3), tokens)
        assert pruner.report.masked_difference < 1e-4 and pruner.model.training == training

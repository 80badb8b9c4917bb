"""Invariant 2, sliced = reloaded: in a fresh process, bit for bit, with the plugin and without it."""

import dataclasses
import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from computed import outputs_of
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import optimum_fwdprune.models
from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.loading.models import load_causal_lm


RELOAD = Path(__file__).parents[1] / "scripts" / "reload.py"
TASKS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
# One of every family of the package, by its `model_type`.
FAMILIES = {
    tiny.make_config(name).model_type: name for name in reversed(tiny.CONFIGS) if name != "persimmon_third_party"
}
# Uniform and per-layer sizes, both units of grouped-query attention, added biases, and half precision.
REQUESTS = {
    "uniform": tiny.request(method="wanda_sp", sparsity=0.4, scope="layer"),
    "per_layer": tiny.request(method="wanda_sp", sparsity=0.4, scope="global", attention_unit="kv_group"),
    "biases_bfloat16": tiny.request(method="flap", sparsity=0.4, scope="global", budget="joint"),
}


def request_for(name, request):
    """One of `REQUESTS`, for the kinds of units that a tiny architecture can lose."""
    return dataclasses.replace(REQUESTS[request], kinds=tiny.kinds_of(name))


def attention_implementations(model):
    if not model._can_set_attn_implementation():
        return [model.config._attn_implementation]
    return ["eager", "sdpa"] if model._supports_sdpa else ["eager"]


def tasks_of(name):
    """The Auto classes that transformers has a class of the family for."""
    return [task for task in TASKS if type(tiny.make_config(name)) in getattr(transformers, task)._model_mapping]


def without_sublayers(model):
    """The model without its first layer, the attention of the second and the MLP of the third."""
    sites = find_sites(model)
    gone = [(0, "attention"), (0, "mlp"), (1, "attention"), (2, "mlp")]
    counts = {site.key: site.num_units for site in sites}
    kept = {key: [] if key in gone else list(range(count)) for key, count in counts.items()}
    plan = PruningPlan(kept, counts, model.config.model_type, "query_head")
    return FwdPruner(model).prune(plan=plan, reconstruction="none")


@torch.no_grad()
def save_checkpoint(folder, model, tokens, auto_class, every_way=True):
    """Save a pruned model with what it computes, for the other process to compare: with every attention and cache, or
    with one of each."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    attention, caches = attention_implementations(model), tiny.caches_of(model)
    if not every_way:
        attention, caches = attention[:1], caches[:1]
    expected = outputs_of(model, tokens, attention, caches)
    if model.can_generate() and model.dtype == torch.float32 and "static" in caches:
        for implementation in attention:
            assert torch.equal(expected[f"static.{implementation}"], expected[f"dynamic.{implementation}"])
    request = {"auto_class": auto_class, "attention": attention, "caches": caches}
    (folder / "request.json").write_text(json.dumps(request))
    save_file({"tokens": tokens}, folder / "inputs.safetensors")
    return expected


def reload_in_fresh_process(folder, route, tmp_path, python=sys.executable):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    if route == "remote":
        environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [python, RELOAD, folder, route], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {path.parent.name: load_file(path) for path in folder.glob("*/outputs.safetensors")}


def assert_equal_bit_for_bit(actual, expected):
    assert actual.keys() == expected.keys()
    for name, outputs in expected.items():
        assert actual[name].keys() == outputs.keys(), name
        for key, value in outputs.items():
            assert torch.equal(actual[name][key], value), f"{name}: {key}"


def test_sliced_equals_reloaded_in_a_fresh_process(tmp_path, tokens):
    expected = {}
    for name in tiny.CONFIGS:
        for request in REQUESTS if name in tiny.REPRESENTATIVE else ["per_layer"]:
            dtype = torch.bfloat16 if request.endswith("bfloat16") else torch.float32
            model = tiny.make_model(name, dtype=dtype)
            pruned = FwdPruner(model).prune(request_for(name, request), tokens)
            case = f"{name}.{request}"
            expected[case] = save_checkpoint(tmp_path / "saved" / case, pruned, tokens[:2], "AutoModelForCausalLM")

    actual = reload_in_fresh_process(tmp_path / "saved", "plugin", tmp_path)

    assert len(actual) == len(tiny.CONFIGS) + 2 * len(tiny.REPRESENTATIVE)
    assert_equal_bit_for_bit(actual, expected)


@pytest.mark.parametrize("part", range(3))
def test_every_family_loads_as_remote_code_without_the_plugin(part, tmp_path, tokens, python_without_the_package):
    """Every family, a third of them at a time, in an environment that does not contain the plugin: all tasks of the
    representative ones, and of the others language models, whose classes share all code with those of other tasks."""
    expected = {}
    for name in list(FAMILIES.values())[part::3]:
        every_way = name in tiny.REPRESENTATIVE
        for task in tasks_of(name) if every_way else ["AutoModelForCausalLM"]:
            model = tiny.make_model(name, getattr(transformers, task), pad_token_id=0)
            pruned = FwdPruner(model).prune(request_for(name, "per_layer"), tokens)
            case = f"{name}.{task}"
            expected[case] = save_checkpoint(tmp_path / "saved" / case, pruned, tokens[:2], task, every_way)
        pruned, case = without_sublayers(tiny.make_model(name)), f"{name}.depth"
        expected[case] = save_checkpoint(
            tmp_path / "saved" / case, pruned, tokens[:2], "AutoModelForCausalLM", every_way
        )

    actual = reload_in_fresh_process(tmp_path / "saved", "remote", tmp_path, python_without_the_package)

    assert_equal_bit_for_bit(actual, expected)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_task_class_of_the_stock_family_has_a_pruned_one(name):
    pruned = {model_class._auto_class for model_class in get_architecture(tiny.make_config(name)).model_classes}

    assert pruned == set(tasks_of(name))


@pytest.mark.parametrize("name", FAMILIES.values())
def test_the_copied_files_are_the_packages_own(name, tmp_path, tokens):
    sources = Path(optimum_fwdprune.models.__file__).parent
    request = {"method": "magnitude", "reconstruction": "none", "kinds": ["mlp"]}
    FwdPruner(tiny.make_model(name)).prune(**request).save_pretrained(tmp_path)
    copied = sorted(path.name for path in tmp_path.glob("*.py"))

    family = f"pruned_{tiny.make_config(name).model_type}.py"
    assert copied == ["experts.py", "layout.py", "per_layer.py", family, "resizing.py", "skipped.py"]
    assert all(filecmp.cmp(tmp_path / name, sources / name, shallow=False) for name in copied)


@pytest.mark.parametrize("name", ["llama_mha_tied", "bloom", "opt_post_norm_projected"])
def test_sharded_checkpoints_and_tied_weights_reload(tmp_path, tokens, name):
    pruned = FwdPruner(tiny.make_model(name)).prune(REQUESTS["per_layer"], tokens)
    pruned.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(tokens).logits, pruned(tokens).logits)


def test_loading_options_reach_every_layer(tmp_path, tokens):
    FwdPruner(tiny.make_model("llama_gqa_biases")).prune(REQUESTS["per_layer"], tokens).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", dtype=torch.bfloat16, attn_implementation="eager"
    )

    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {layer.self_attn.config._attn_implementation for layer in loaded.model.layers} == {"eager"}
    assert loaded(tokens, output_attentions=True).attentions[0] is not None
    # A dispatched model is pruned again like any other.
    assert FwdPruner(loaded).prune(REQUESTS["uniform"], tokens)(tokens).logits.isfinite().all()


@pytest.mark.parametrize("architecture_name", tiny.CONFIGS)
@torch.no_grad()
def test_left_padded_generation_equals_unpadded_generation(tokens, architecture_name):
    pruned = FwdPruner(tiny.make_model(architecture_name)).prune(request_for(architecture_name, "per_layer"), tokens)
    prompts = [tokens[0, :9], tokens[1, :5]]
    batch = torch.zeros(2, 9, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = pruned.generate(batch, attention_mask=mask, **options)

    for row, prompt in enumerate(prompts):
        alone = pruned.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
        assert torch.equal(together[row, -6:], alone[0, -6:])


@torch.no_grad()
def test_beam_search_equals_that_of_the_masked_dense_model(tokens, architecture_name):
    from optimum_fwdprune.architectures import find_sites
    from optimum_fwdprune.forward.gates import gated

    dense = tiny.make_model(architecture_name)
    pruner = FwdPruner(dense)
    config = tiny.request(sparsity=0.3, scope="global", reconstruction="none")
    pruned = pruner.prune(config, tokens, inplace=False)
    sites = find_sites(dense, config.attention_unit)
    prompt = {"input_ids": tokens[:1, :6], "attention_mask": torch.ones_like(tokens[:1, :6])}
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with gated(sites, tiny.masks_of(pruner.plan)):
        expected = dense.generate(**prompt, **options)

    assert torch.equal(pruned.generate(**prompt, **options), expected)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(("name", "task"), [*(("llama_mha_tied", task) for task in TASKS), ("bloom", TASKS[2])])
@torch.no_grad()
def test_the_pruner_opens_a_checkpoint_for_the_task_that_it_was_saved_for(name, task, low_memory, tokens, tmp_path):
    """A head that was dropped, or drawn at random, would be noticed by nobody."""
    model = tiny.make_model(name, getattr(transformers, task), pad_token_id=0)
    # Beside tied embeddings a bare model is a whole language model.
    dense_class = type(tiny.make_model(name)) if task == "AutoModel" else type(model)
    model.save_pretrained(tmp_path / "dense")
    opened = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=low_memory)
    assert type(opened.model) is dense_class
    assert torch.equal(opened.model.base_model(tokens)[0], model.base_model(tokens)[0])

    pruner = FwdPruner(model)
    pruned = pruner.prune(REQUESTS["uniform"], tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    again = FwdPruner.from_pretrained(tmp_path / "pruned", low_memory=low_memory)
    assert type(again.model) is type(pruned)
    assert torch.equal(again.model(tokens)[0], pruned(tokens)[0])


def test_a_pruned_classifier_is_no_language_model(tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_mqa", transformers.AutoModelForSequenceClassification, pad_token_id=0))
    pruner.prune(REQUESTS["uniform"], tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    with pytest.raises(
        ValueError, match=r"PrunedLlamaForSequenceClassification, .*; use AutoModelForSequenceClassification"
    ):
        load_causal_lm(tmp_path / "pruned")


@pytest.mark.parametrize("name", ["llama_gqa_biases", "bloom"])
@torch.no_grad()
def test_a_model_with_the_code_beside_its_weights_is_known_as_pruned(name, tokens, tmp_path):
    """As `trust_remote_code=True` loads it where the package was not imported before."""
    pruned = FwdPruner(tiny.make_model(name)).prune(REQUESTS["per_layer"], tokens)
    pruned.save_pretrained(tmp_path / "once")
    reference = json.loads((tmp_path / "once" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    remote_class = get_class_from_dynamic_module(reference, tmp_path / "once")
    remote = remote_class.from_pretrained(tmp_path / "once")
    assert not isinstance(remote, type(pruned))

    pruner = FwdPruner(remote)
    twice = pruner.prune(tiny.request(method="flap", sparsity=0.3), tokens)
    pruner.save_pretrained(tmp_path / "twice")
    loaded = load_causal_lm(tmp_path / "twice")

    assert isinstance(twice, type(pruned))
    assert torch.equal(loaded(tokens).logits, twice(tokens).logits)
    expected = FwdPruner(pruned).prune(tiny.request(method="flap", sparsity=0.3), tokens)
    assert torch.equal(twice(tokens).logits, expected(tokens).logits)


def test_a_class_of_another_tool_is_not_taken_for_a_pruned_one():
    class PrunedConfig(transformers.LlamaConfig):
        model_type = "pruned_llama"

    with pytest.raises(ValueError, match="per-layer sizes of another tool"):
        get_architecture(PrunedConfig(num_hidden_layers=2, per_layer_config={0: {"intermediate_size": 8}}))


@pytest.mark.parametrize("load", [FwdPruner.from_pretrained, load_causal_lm])
def test_models_that_are_not_in_the_cache_are_refused_offline_with_a_way_out(load):
    with pytest.raises(OSError, match=r"some/model is neither .* HF_HUB_OFFLINE is set.*, or name a folder that"):
        load("some/model")

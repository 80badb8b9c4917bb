"""Stock export: what it writes loads where this package is not, and computes the same."""

import json
import os
import subprocess

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.export import export_gguf, export_stock


# Their stock classes work the width of a head out of the number of heads, or no head of them can be removed.
NO_STOCK_HEADS = {"opt_pre_norm", "opt_post_norm_projected", "opt_no_biases", "helium", "phi"}
NO_STOCK_HEADS |= {"codegen", "gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "persimmon_third_party"}
NO_STOCK_HEADS |= {name for name in tiny.CONFIGS if name.startswith(("falcon", "stablelm"))}
NO_STOCK_HEADS |= set(tiny.FIXED_HEADS)
HOLDABLE = [name for name in tiny.CONFIGS if name != "bloom"]

DEPTH = "without a layer"

LOAD = """
import importlib.util, json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file

assert importlib.util.find_spec("optimum_fwdprune") is None
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto = getattr(transformers, (folder / "auto_class").read_text())
    model = auto.from_pretrained(folder, dtype="auto").eval()
    assert not type(model).__name__.startswith("Pruned")
    tokens = load_file(folder / "inputs.safetensors")["tokens"]
    with torch.no_grad():
        found = {"first": model(tokens)[0].contiguous()}
        if model.can_generate():
            found["generated"] = model.generate(tokens[:, :6], max_new_tokens=6, do_sample=False, pad_token_id=0)
    save_file(found, folder / "outputs.safetensors")
"""


def pruned(name, tokens, auto_class="AutoModelForCausalLM", **fields):
    # Classifiers look for it.
    model = tiny.make_model(name, getattr(transformers, auto_class), pad_token_id=0)
    kinds = ["mlp"] if name in NO_STOCK_HEADS else ["attention", "mlp"]
    request = {"method": "magnitude", "reconstruction": "none", "sparsity": 0.3, "kinds": kinds, "layout": "stock"}
    pruner = FwdPruner(model)
    pruner.prune(tiny.request(**request | fields), tokens)
    return pruner


@torch.no_grad()
def test_every_family_and_task_loads_without_the_package(tokens, tmp_path, python_without_the_package):
    """One process loads them all."""
    cases = [(name, "AutoModelForCausalLM") for name in HOLDABLE]
    cases += [("llama_gqa_biases", "AutoModelForSequenceClassification"), ("qwen2", "AutoModelForQuestionAnswering")]
    cases += [("llama_mha_tied", "AutoModelForTokenClassification"), ("mistral_sliding_window", "AutoModel")]
    # Models without whole layers are saved as such checkpoints; those of some families with lists by layer.
    cases += [(name, DEPTH) for name in ("llama_gqa_biases", "gemma3_text", "smollm3", "bloom", "falcon_alibi")]
    expected = {}
    for name, auto_class in cases:
        folder = tmp_path / f"{name}-{auto_class}"
        if auto_class == DEPTH:
            auto_class = "AutoModelForCausalLM"
            pruner = pruned(name, tokens, kinds=["layer"], layout="any")
            pruner.save_pretrained(folder)
            model = pruner.model.eval()
        else:
            model = pruned(name, tokens, auto_class).model.eval()
            export_stock(model, None, folder)
        (folder / "auto_class").write_text(auto_class)
        save_file({"tokens": tokens[:1]}, folder / "inputs.safetensors")
        expected[folder] = (model(tokens[:1])[0], None)
        if model.can_generate():
            generated = model.generate(tokens[:1, :6], max_new_tokens=6, do_sample=False, pad_token_id=0)
            expected[folder] = (model(tokens[:1])[0], generated)
    script = [python_without_the_package, "-c", LOAD, str(tmp_path)]
    # Where the checkout is not the working directory, which Python imports from.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, cwd=tmp_path.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

    for folder, (first, generated) in expected.items():
        found = load_file(folder / "outputs.safetensors")
        assert torch.allclose(found["first"], first, atol=1e-4 * float(first.abs().max())), folder.name
        assert generated is None or torch.equal(found["generated"], generated), folder.name
        config = json.loads((folder / "config.json").read_text())
        assert "per_layer_config" not in config and "auto_map" not in config


FRACTIONS = [(name, sparsity) for name in HOLDABLE for sparsity in (0.05, 0.2, 0.37)]


@pytest.mark.parametrize(
    ("name", "sparsity"), [each for each in FRACTIONS if each[0] in tiny.REPRESENTATIVE or each[1] == 0.2]
)
def test_a_stock_layout_is_always_exported(name, sparsity, tokens, tmp_path):
    pruner = pruned(name, tokens, sparsity=sparsity)
    counts = {
        kind: {len(units) for (_, each), units in pruner.plan.kept.items() if each == kind}
        for kind in ("attention", "mlp")
    }

    assert all(len(found) == 1 for found in counts.values())
    assert export_stock(pruner.model, None, tmp_path / "stock").is_dir()
    # A channel of every layer is the smallest step.
    assert abs(pruner.report.sparsity - sparsity) < 1 / 64


def test_llama_is_mistral_where_its_heads_no_longer_divide_the_hidden_size(tokens, tmp_path):
    model = pruned("llama_mha_tied", tokens, sparsity=0.15).model
    assert {len(layer.self_attn.q_proj.weight) // 8 for layer in model.model.layers} == {5}
    folder = export_stock(model, None, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    assert type(stock) is transformers.MistralForCausalLM and stock.config.sliding_window is None
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, model.eval()(tokens).logits)


def test_the_tokenizer_and_what_it_generates_by_come_along(tokens, tokenizer, tmp_path):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ messages[0]['content'] }}"
    model = pruned("llama_mqa", tokens).model
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    folder = export_stock(model, chatty, tmp_path / "stock")

    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == chatty.chat_template
    assert transformers.GenerationConfig.from_pretrained(folder).temperature == 0.7
    assert transformers.AutoConfig.from_pretrained(folder).architectures == ["LlamaForCausalLM"]


def without(model, *gone):
    """The model without some of its sites."""
    sites = find_sites(model)
    counts = {site.key: site.num_units for site in sites}
    kept = {key: [] if key in gone else list(range(count)) for key, count in counts.items()}
    plan = PruningPlan(kept, counts, model.config.model_type, "query_head")
    return FwdPruner(model).prune(plan=plan, reconstruction="none")


@torch.no_grad()
@pytest.mark.parametrize("name", [*tiny.REPRESENTATIVE, "qwen3"])
def test_a_model_without_whole_layers_is_a_stock_model_of_its_family(name, tokens, tmp_path):
    model = without(tiny.make_model(name), (1, "attention"), (1, "mlp"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export_stock(model, None, tmp_path / "stock"))

    assert loaded.config.model_type == tiny.make_config(name).model_type and loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_model_without_a_sublayer_is_no_stock_model(kind, tmp_path):
    model = without(tiny.make_model("llama_mqa"), (1, kind))
    with pytest.raises(ValueError, match=rf"layer 1 of this pruned_llama has no {kind}\. Remove whole layers"):
        export_stock(model, None, tmp_path / "stock")


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "fields", "message"),
        [
            ("llama_mqa", {"scope": "global"}, r"layer \d has .* whereas layer 0 has .*layout='stock'"),
            ("opt_pre_norm", {"kinds": ["attention"]}, "a stock opt has 48 x 48 at .*k_proj.weight where"),
            ("bloom", {"kinds": ["mlp"]}, "a stock bloom has 192 x 48 at .*dense_h_to_4h.weight where"),
            ("bloom", {"kinds": ["attention"]}, "a stock bloom has"),
            ("llama_mqa", {"method": "flap", "reconstruction": "bias", "kinds": ["mlp"]}, r"nothing at .*bias"),
            ("llama_gqa_biases", {"sparsity": 0.05, "attention_sparsity": 0.15}, None),
        ],
    )
    def test_what_no_stock_checkpoint_holds_names_what_is_in_the_way(self, name, fields, message, tokens, tmp_path):
        request = {"method": "random", "reconstruction": "none", "sparsity": 0.3, **fields}
        model = FwdPruner(tiny.make_model(name)).prune(tiny.request(**request), tokens)
        if message is None:
            # Biases keep it from being a Mistral, and a divisor of the hidden size lets it be a LLaMA.
            export_stock(model, None, tmp_path / "stock")
            return
        with pytest.raises(ValueError, match=message):
            export_stock(model, None, tmp_path / "stock")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "fields", "message"),
        [
            ("bloom", {}, "layout='stock' does not allow pruning attention of this model. No stock checkpoint"),
            ("opt_pre_norm", {"kinds": ["attention", "mlp"]}, "does not allow pruning attention of this model"),
            ("llama_mqa", {"reconstruction": "bias", "method": "flap"}, r"nothing at .*bias"),
            ("llama_mqa", {"reconstruction": "bias", "kinds": ["mlp"]}, r"or reconstruction='none', which add no"),
            ("bloom", {"kinds": ["attention"]}, r"the pruned model has 72 x 48\. Leave out layout\."),
            ("opt_pre_norm", {"kinds": ["attention"]}, r"Set kinds=\['mlp'\], or leave out layout\."),
        ],
    )
    def test_requests_that_cannot_be_exported_fail_before_scoring(self, name, fields, message, tokens, monkeypatch):
        monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", lambda *_: pytest.fail("it was scored"))
        with pytest.raises(ValueError, match=message):
            pruned(name, tokens, **fields)

    @pytest.mark.parametrize("fields", [{"scope": "global"}, {"scope": "search"}, {"skip_layers": [0]}])
    def test_layouts_of_uneven_layers_are_refused(self, fields):
        with pytest.raises(ValueError, match="layout='stock' cuts every layer alike"):
            tiny.request(layout="stock", **fields)

    def test_a_method_that_learns_the_split_is_told_what_goes_with_the_layout(self, tokens):
        options = {"method": "policy_gradient", "layout": "stock", "kinds": ["mlp"]}
        with pytest.raises(ValueError, match=r"layout='stock' .*; use parametrization='unit', or leave out"):
            tiny.request(**options)
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(dataset=tokens, parametrization="unit", steps=1, reconstruction="none", **options)

        assert len({len(kept) for (_, kind), kept in pruner.plan.kept.items() if kind == "mlp"}) == 1

    def test_a_stock_model_that_computes_something_else_is_not_written(self, tokens, tmp_path, monkeypatch):
        model = pruned("llama_mqa", tokens).model
        monkeypatch.setattr(
            "optimum_fwdprune.export.stock.logits", lambda each, probe: torch.full((1, 1), float("nan"))
        )
        with pytest.raises(RuntimeError, match=r"The logits of the stock .* differ from those of the pruned model"):
            export_stock(model, None, tmp_path / "stock")
        assert list(tmp_path.iterdir()) == []

    def test_folders_that_hold_something_are_left_alone(self, tokens, tmp_path):
        (tmp_path / "mine").write_text("x")
        with pytest.raises(FileExistsError, match="is not empty"):
            export_stock(pruned("llama_mqa", tokens).model, None, tmp_path)
        assert (tmp_path / "mine").read_text() == "x"


def test_deep_models_spare_no_layer_under_a_stock_layout(tokens):
    model = tiny.make_model("llama_mqa", num_hidden_layers=12)
    pruner = FwdPruner(model)
    pruner.prune(tiny.request(method="magnitude", sparsity=0.3, layout="stock", kinds=["mlp"]), tokens)

    assert len({len(pruner.plan.kept[layer, "mlp"]) for layer in range(12)}) == 1


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_first_layer_that_is_whole_is_a_layer_like_others(kind, tmp_path):
    """Its config writes down nothing of it."""
    model = tiny.make_model("llama_mha_tied")
    sites = find_sites(model)
    counts = {site.key: site.num_units for site in sites}
    cut = [site.key for site in sites if site.layer > 0 or site.kind != kind]
    kept = {key: list(range(count // 2 if key in cut else count)) for key, count in counts.items()}
    pruner = FwdPruner(model)
    pruner.prune(plan=PruningPlan(kept, counts, "llama", "query_head", {}))
    name, whole, half = {
        "attention": ("num_attention_heads", 6, 3),
        "mlp": ("intermediate_size", 64, 32),
    }[kind]
    with pytest.raises(ValueError, match=f"layer 1 has {name}={half}, whereas layer 0 has {whole}"):
        export_stock(pruner.model, None, tmp_path / "stock")


def test_a_consumed_model_is_not_exported(tokens, tokenizer, tmp_path):
    model = tiny.make_model("llama_mqa")
    FwdPruner(model).prune(tiny.request(sparsity=0.3), tokens)
    for export, name in ((export_stock, "stock"), (export_gguf, "model.gguf")):
        with pytest.raises(ValueError, match="was consumed by prune"):
            export(model, tokenizer, tmp_path / name)
    assert list(tmp_path.iterdir()) == []

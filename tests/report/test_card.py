"""The model card says what was done, and its command makes the same weights again."""

import dataclasses
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import tiny_multimodal
import torch
from huggingface_hub import ModelCard
from optimum.commands.optimum_cli import main
from safetensors.torch import load_file

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, RecoveryArguments, register_method
from optimum_fwdprune.evaluation import Comparison, Evaluation
from optimum_fwdprune.evaluation.perplexity import TextLoss
from optimum_fwdprune.loading.base import Base
from optimum_fwdprune.report.card import write_card


TEXT = {"calibration": "builtin", "n_samples": 4, "seq_len": 32}


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """The current folder, with the dense checkpoint `dense` in float16 and a text."""
    monkeypatch.chdir(tmp_path)
    tiny.make_model("llama_gqa_biases", dtype=torch.float16, mlp_bias=False).save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    (tmp_path / "-a text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return tmp_path


def card_of(pruner, name="pruned"):
    pruner.save_pretrained(name, overwrite=True)
    return Path(name, "README.md").read_text()


def command_in(card):
    """The words of the command, or `None` where there is none."""
    found = re.search(r"## Reproduce it\n\n```bash\n(.*?)\n```", card, re.DOTALL)
    return found and shlex.split(found[1])


def run(words, monkeypatch, model="dense", output="again"):
    """Run a card's command with names in the places of MODEL and OUTPUT; return the weights that it writes."""
    words = [{"MODEL": model, "OUTPUT": output}.get(word, word) for word in words]
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
    main()
    return load_file(f"{output}/model.safetensors")


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


REQUESTS = {
    "defaults": {},
    "preset": {"request": "best", "sparsity": 0.4},
    "lists and flags": {"kinds": ["attention", "mlp"], "skip_layers": [0, -1], "refit_sources": True},
    "an empty list": {"skip_layers": [], "method": "random", "reconstruction": "none", "seed": 5},
    "options of a method": {"method": "policy_gradient", "steps": 3, "learning_rate": 1e-05, "antithetic": True},
    "a paper": {"request": "policy-gradient-paper", "steps": 2, "windows_per_step": 2, "metric_samples": None},
    "rounds and groups": {"rounds": 2, "attention_unit": "kv_group", "kinds": ["attention", "mlp"], "sparsity": 0.5},
    "search": {"scope": "search", "search_windows": 40, "reconstruction": "bias"},
    "the model's own text": {"calibration": "self", "seq_len": 16},
    "a file": {"calibration": "-a text.txt", "dataset_split": "train", "ridge": 1e-06},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_command_makes_the_same_weights(name, folder, monkeypatch):
    fields = TEXT | REQUESTS[name]
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(fields.pop("request", None), **fields)
    card = card_of(pruner)

    assert same(run(command_in(card), monkeypatch), load_file("pruned/model.safetensors")), card


def test_the_command_names_the_text_that_was_taken_by_default(folder, monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.data.load_calibration._default_source", lambda: "self")
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(n_samples=4, seq_len=16)
    card = card_of(pruner)

    monkeypatch.setattr("optimum_fwdprune.data.load_calibration._default_source", lambda: "builtin")
    assert same(run(command_in(card), monkeypatch), load_file("pruned/model.safetensors")), card


@pytest.mark.parametrize("loading", [{"dtype": torch.float32}, {"attn_implementation": "eager", "dtype": "bfloat16"}])
def test_the_command_loads_the_model_as_it_was_loaded(loading, folder, monkeypatch):
    pruner = FwdPruner.from_pretrained("dense", **loading)
    pruner.prune(method="magnitude", reconstruction="none")
    words = command_in(card_of(pruner))

    assert same(run(words, monkeypatch), load_file("pruned/model.safetensors")), words


@pytest.mark.parametrize("reconstruction", ["none", "least_squares"])
def test_the_command_of_a_replay_replays(reconstruction, folder, monkeypatch):
    FwdPruner.from_pretrained("dense").prune(**TEXT)
    source = FwdPruner.from_pretrained("dense")
    source.prune(method="random", reconstruction="none")
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(plan=source.plan, reconstruction=reconstruction, **TEXT)
    pruner.save_pretrained("pruned")
    pruned = load_file("pruned/model.safetensors")
    card = Path("pruned/README.md").read_text()
    monkeypatch.chdir("pruned")

    assert "run the command in its folder" in card
    assert same(run(command_in(card), monkeypatch, "../dense", "../again"), pruned), card


def test_a_card_that_is_written_anew_has_the_same_command(folder):
    pruner = FwdPruner.from_pretrained("dense", dtype="float32")
    pruner.prune(**TEXT)
    words = command_in(card_of(pruner))

    assert command_in(card_of(FwdPruner.from_pretrained("pruned"), "copied")) == words
    assert (
        words[words.index("-m") + 1] == "MODEL"
        and "`MODEL` is the dense model, here a folder named `dense`" in (folder / "copied" / "README.md").read_text()
    )


def test_a_repository_of_the_hub_is_named(folder):
    model = tiny.make_model("llama_gqa_biases")
    model.config._name_or_path = "someone/llama"
    pruner = FwdPruner(model)
    pruner.prune(method="magnitude", reconstruction="none")
    card = card_of(pruner)

    assert command_in(card)[3:6] == ["-m", "someone/llama", "OUTPUT"] and "--dtype float32" in card
    assert "The model was passed to `FwdPruner` in Python" in card


def prune_with_tokens(pruner, tokens):
    pruner.prune(dataset=tokens)


def prune_with_strings(pruner, tokens):
    pruner.prune(dataset=["the quick brown fox. " * 2000], n_samples=4, seq_len=32)


def prune_with_scores(pruner, tokens):
    scores = pruner.score(**TEXT | {"n_samples": 3})
    pruner.prune(scores=dataclasses.replace(scores, calibration=None), **TEXT)


def prune_with_own_method(pruner, tokens):
    pruner.prune(method="own", reconstruction="none")


@pytest.mark.parametrize(
    ("prune", "reason"),
    [
        (prune_with_tokens, "its calibration data was passed to `prune(dataset=...)`"),
        (prune_with_strings, "its calibration data was passed to `prune(dataset=...)`"),
        (prune_with_scores, "its scores were made with another request"),
        (prune_with_own_method, "the method `own` was registered in Python"),
    ],
)
def test_what_no_command_can_make_has_none_and_says_why(prune, reason, folder, tokens, monkeypatch):
    import dataclasses

    from optimum_fwdprune.request import config as configuration
    from optimum_fwdprune.request import options, registry

    known = dict(registry.METHODS)
    monkeypatch.setattr(registry, "METHODS", known)
    monkeypatch.setattr(configuration, "METHODS", known)
    monkeypatch.setattr(options, "METHODS", known)
    own = dataclasses.make_dataclass("OwnConfig", [("method", str, "own")], bases=(PruningConfig,))
    own.__module__ = __name__
    register_method(own, lambda inputs: {site.key: torch.rand(site.num_units) for site in inputs.sites})

    pruner = FwdPruner.from_pretrained("dense")
    prune(pruner, tokens)
    card = card_of(pruner)

    assert command_in(card) is None and reason in card and "pruner.prune(PruningConfig.from_pretrained(" in card


def test_pruned_from_a_pruned_model_says_so(folder):
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(method="magnitude", reconstruction="none")
    pruner.recovery = {"mode": "full", "steps": 7}
    pruner.prune(method="magnitude", reconstruction="none", sparsity=0.3)
    card = card_of(pruner)

    assert "`MODEL` is the pruned model that this pruning started from." in card
    assert "Before this pruning it had been trained in all weights for 7 steps." in card.partition("## ")[0]
    # Also where the plan of the second has nothing of the first.
    pruner.plan = None
    pruner.prune(method="magnitude", reconstruction="none", sparsity=0.3)
    assert "The weights that were kept are equal to those of the model before this pruning." in card_of(
        pruner, "again"
    )


INTRODUCTIONS = [
    ({"kinds": ["mlp"]}, ["MLP channels were removed, and all attention heads were kept."]),
    (
        {"kinds": ["attention"], "attention_sparsity": 0.5},
        ["Attention heads were removed, and all MLP channels were kept."],
    ),
    ({"kinds": ["attention", "mlp"], "sparsity": 0.5}, ["Attention heads and MLP channels were removed."]),
    (
        {"kinds": ["attention"], "attention_unit": "kv_group", "attention_sparsity": 0.4},
        ["KV groups were removed, and"],
    ),
    ({"sparsity": 0.0}, ["No unit was removed: every layer keeps its size."]),
    ({"reconstruction": "none"}, ["The weights that were kept are equal to those of the dense model."]),
    ({"reconstruction": "bias"}, ["Biases of the output projections replace the mean output of the removed units."]),
    ({}, ["The kept columns of output projections were refitted by least squares one layer after the other."]),
    ({"reconstruction_order": "independent"}, ["of output projections were refitted by least squares."]),
    ({"refit_sources": True}, ["the output projections, and the linears before them, were refitted"]),
    ({"rounds": 2}, ["The method `wanda_sp` chose them in 2 rounds, with forward passes only."]),
    ({"method": "taylor"}, ["The method `taylor` chose them, with back-propagation."]),
    (
        {"scope": "search", "search_windows": 40},
        ["A search that compared whole pruned models decided how many units each layer keeps."],
    ),
    ({"calibration": "self", "seq_len": 16}, ["It was calibrated on text that the model generated."]),
    ({"calibration": "builtin"}, ["It was calibrated on Python's documentation."]),
]


@pytest.mark.parametrize(("fields", "sentences"), INTRODUCTIONS)
def test_the_introduction_says_what_was_done(fields, sentences, folder):
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(**TEXT | fields)
    introduction = card_of(pruner).partition("## ")[0]

    assert "This is `dense`, made smaller by structured pruning" in introduction
    assert all(sentence in introduction for sentence in sentences), introduction
    if fields.get("sparsity") == 0.0:
        assert "chose them" not in introduction


def test_a_plan_made_by_hand_is_called_no_method(folder):
    source = FwdPruner.from_pretrained("dense")
    source.prune(method="random", reconstruction="none")
    plan = PruningPlan(source.plan.kept, source.plan.num_units, "llama", "query_head")
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(plan=plan)
    introduction = card_of(pruner).partition("## ")[0]

    assert "The choice of units was read from an existing plan." in introduction and "wanda_sp" not in introduction


@pytest.mark.parametrize(
    ("mode", "dataset", "sentence"),
    [
        ("full", "-a text.txt", "it was trained in all weights for 1 step on `-a text.txt`."),
        (
            "lora",
            ["the quick brown fox. " * 500],
            "with LoRA adapters, which are merged into the weights, for",
        ),
        ("distill", "builtin", "on `builtin`, towards the predictions of the dense model."),
    ],
)
def test_the_introduction_names_how_and_on_what_the_model_was_trained(mode, dataset, sentence, folder):
    pruner = FwdPruner.from_pretrained("dense", dtype=torch.float32)
    pruner.prune(method="magnitude", reconstruction="none")
    options = {"output_dir": "training", "use_cpu": True, "max_steps": 1, "report_to": "none", "max_length": 16}
    pruner.recover(dataset, RecoveryArguments(mode=mode, save_strategy="no", disable_tqdm=True, **options))
    card = card_of(pruner)

    assert sentence in card.partition("## ")[0], card
    assert "The command reproduces the pruned model before training." in card
    listed = dict(re.findall(r"^- ([a-z ]+): (.*)$", card, re.MULTILINE))
    summary = pruner._record.recovery
    assert listed["adapters"] == ("yes" if summary["adapters"] else "no")
    assert listed["trained parameters"] == f"{summary['trained parameters']:,}"
    assert summary["trained parameters"] >= 1000 and listed["learning rate"] == str(summary["learning rate"])
    assert sentence in card_of(FwdPruner.from_pretrained("pruned"), "copied").partition("## ")[0]


def test_the_command_of_a_recovery_makes_the_same_weights(folder, monkeypatch):
    pruner = FwdPruner.from_pretrained("dense", dtype=torch.float32)
    pruner.prune(method="magnitude", reconstruction="none")
    pruner.save_pretrained("pruned")
    options = {"output_dir": "training", "use_cpu": True, "max_steps": 2, "report_to": "none", "max_length": 16}
    pruner.recover("-a text.txt", RecoveryArguments(mode="full", save_strategy="no", disable_tqdm=True, **options))
    card = card_of(pruner, "recovered")
    words = shlex.split(re.search(r"^optimum-cli fwdprune recover .*$", card, re.MULTILINE)[0])
    words = [{"PRUNED": "pruned", "OUTPUT": "again"}.get(word, word) for word in words]
    # Where the trained weights do not depend on them, arguments are not part of the command.
    monkeypatch.setattr(sys, "argv", [*words, "use_cpu=True"])
    main()

    assert same(load_file("again/model.safetensors"), load_file("recovered/model.safetensors")), card
    assert "data in memory" not in card and "`PRUNED` is the model before this training." in card


def test_training_that_no_command_can_repeat_says_so(folder):
    pruner = FwdPruner.from_pretrained("dense", dtype=torch.float32)
    pruner.prune(method="magnitude", reconstruction="none")
    options = {"output_dir": "training", "use_cpu": True, "max_steps": 1, "report_to": "none", "max_length": 16}
    pruner.recover(["the quick brown fox. " * 99], RecoveryArguments(save_strategy="no", disable_tqdm=True, **options))
    card = card_of(pruner)

    assert "fwdprune recover" not in card
    assert "No command can repeat a training whose data, teacher or callbacks were passed in Python." in card


def metadata_of(folder):
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_metadata_are_those_that_the_hub_reads(folder):
    model = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(model)
    pruner.prune(method="magnitude", reconstruction="none")
    recovery = {"mode": "full", "command": {"data": ["wikitext2", "me/chats:0.5", "my.txt"], "arguments": []}}
    losses = {"wikitext2": TextLoss(20.0, 10), "my.txt": TextLoss(10.0, 10)}
    comparison = Comparison([Evaluation("dense", losses, []), Evaluation("pruned", losses, [])])
    record = dataclasses.replace(pruner._record, recovery=recovery, comparison=comparison)
    base = Base("me/dense", True, {"license": "other", "license_name": "kind"}, ("en", "de"))
    write_card(folder, "me/pruned", pruner.model, record, base)
    found = metadata_of(folder)

    assert (found["base_model"], found["base_model_relation"]) == ("me/dense", "finetune")
    assert (found["license"], found["license_name"], found["language"]) == ("other", "kind", ["en", "de"])
    assert found["datasets"] == ["Salesforce/wikitext", "me/chats"]
    assert found["pipeline_tag"] == "text-generation" and found["tags"] == ["pruned", "optimum-fwdprune"]
    (index,) = found["model-index"]
    dataset = index["results"][0]["dataset"]
    assert index["name"] == "pruned" and len(index["results"]) == 2
    assert (dataset["type"], dataset["config"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert index["results"][0]["metrics"] == [{"type": "perplexity", "value": pytest.approx(math.exp(2))}]


def test_a_folder_is_no_base_model(folder):
    pruner = FwdPruner.from_pretrained("dense")
    pruner.prune(method="magnitude", reconstruction="none")
    card_of(pruner)

    assert not {"base_model", "base_model_relation", "datasets", "model-index"} & metadata_of(folder / "pruned").keys()


@pytest.mark.parametrize(("has_tokenizer", "line"), [(True, "tokenizer = AutoTokenizer"), (False, None)])
def test_the_lines_that_load_the_model_run(has_tokenizer, line, folder):
    pruner = FwdPruner.from_pretrained("dense")
    pruner.tokenizer = pruner.tokenizer if has_tokenizer else None
    pruner.prune(method="magnitude", reconstruction="none")
    card = card_of(pruner)
    blocks = re.findall(r"```python\n(.*?)```", card.partition("## Size")[0], re.DOTALL)

    assert len(blocks) == 3 and (line in card if line else "Tokenizer" not in card)
    for block in blocks[1:]:
        exec(block, {})


def test_a_multimodal_model_is_called_one(folder):
    model = tiny_multimodal.make_model("gemma3")
    pruner = FwdPruner(model)
    pruner.prune(method="magnitude", reconstruction="none")
    card = card_of(pruner)

    assert metadata_of(folder / "pruned")["pipeline_tag"] == "image-text-to-text"
    assert "AutoModelForImageTextToText" in card

"""A family whose linears store their weights transposed is pruned as if they did not."""

import pytest
import tiny
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.forward.gates import gated


REQUESTS = {
    **{method: {"method": method, **tiny.SHORT.get(method, {})} for method in tiny.methods_of_dense_models()},
    "taylor, by element": {"method": "taylor", "salience": "element"},
    "mini_llm, exact": {"method": "mini_llm", "gradient": "exact"},
    "mini_llm, units": {"method": "mini_llm", "draws": 3, "perturb": "units"},
    "bias": {"reconstruction": "bias"},
    "independent": {"reconstruction_order": "independent"},
    "layer": {"reconstruction_target": "layer"},
    "refit_sources": {"refit_sources": True},
    "search": {"scope": "search", "search_windows": 60},
    "rounds": {"rounds": 2},
}


class _PlainLinear(nn.Linear):
    """A linear that is also built as GPT-2 builds its own: `(out_features, in_features)`."""

    def __init__(self, *sizes, **options):
        super().__init__(*(sizes if options else reversed(sizes)), **options)


def with_plain_linears(model):
    """The same model with `[out_features, in_features]` weights; GPT-2 must be patched to build such."""
    plain = type(model)(model.config).eval()
    transposed = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, _PlainLinear)}
    weights = {name: value.T if name in transposed else value for name, value in model.state_dict().items()}
    assert transposed
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_transposed_weights_change_neither_scores_nor_the_pruned_model(fields, tokens, monkeypatch):
    dense = tiny.make_model("gpt2")
    scope = {} if tiny.kinds_scored_by(fields.get("method")) == ["layer"] else {"scope": "global"}
    config = tiny.request(**{"sparsity": 0.3, **scope, **fields})
    pruner = FwdPruner(dense)
    logits = pruner.prune(config, tokens, inplace=False)(tokens).logits

    monkeypatch.setattr(modeling_gpt2, "Conv1D", _PlainLinear)
    plain = FwdPruner(with_plain_linears(dense))
    expected = plain.prune(config, tokens)(tokens).logits

    assert pruner.plan.kept == plain.plan.kept
    for key, scores in plain.scores.values.items():
        torch.testing.assert_close(pruner.scores.values[key], scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_on_disk_is_cut_and_written_as_it_is_stored(tokens, tokenizer, tmp_path):
    dense = tiny.make_model("gpt2")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = tiny.request(sparsity=0.3, scope="global", refit_sources=True)
    expected = FwdPruner(dense, tokenizer).prune(config, tokens)
    pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
    pruner.prune(config, tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")

    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)


def test_hooks_and_forward_passes_that_are_taken_back_leave_the_model_as_it_was(tokens):
    dense = tiny.make_model("gpt2")
    expected = dense(tokens).logits
    pruner = FwdPruner(dense)
    sites = find_sites(dense)
    with gated(sites, {site.key: torch.zeros(site.num_units) for site in sites}):
        assert not torch.allclose(dense(tokens).logits, expected, atol=1e-3)
    pruner.score(tiny.request("mini_llm", sparsity=0.3, draws=3), tokens)

    assert torch.equal(dense(tokens).logits, expected)
    assert not any("forward" in vars(module) or module._forward_hooks for module in dense.modules())


def test_forward_passes_that_accelerate_has_replaced_stay(tokens):
    dense = tiny.make_model("gpt2")
    linears = [module for module in dense.modules() if isinstance(module, Conv1D)]
    for linear in linears:
        add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))
    before = [linear.forward for linear in linears]
    FwdPruner(dense).score(tiny.request("mini_llm", sparsity=0.3, draws=3), tokens)

    assert [linear.forward for linear in linears] == before


@pytest.mark.parametrize("in_encoder_decoder", [False, True])
def test_attention_to_an_encoder_stays_whole(in_encoder_decoder, tokens):
    dense = tiny.make_model("gpt2", add_cross_attention=in_encoder_decoder)
    pruned = FwdPruner(dense).prune(tiny.request(sparsity=0.4, reconstruction="none"), tokens, inplace=False)
    whole = [name for name, _ in dense.named_parameters() if "crossattention" in name]

    assert bool(whole) == in_encoder_decoder
    for name in whole:
        assert torch.equal(pruned.get_parameter(name), dense.get_parameter(name))

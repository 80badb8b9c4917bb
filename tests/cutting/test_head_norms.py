"""Norms of queries and keys with weights for every head are cut with the heads."""

import pytest
import tiny
import torch
import transformers

from optimum_fwdprune import FwdPruner, find_sites


NAMES = ("cohere_query_norms", "stablelm_parallel_query_norms")


@torch.no_grad()
@pytest.mark.parametrize("unit", ["query_head", "kv_group"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_disk_keeps_the_norms_of_the_heads_that_it_keeps(name, unit, tokens, tmp_path):
    dense = tiny.make_model(name)
    dense.save_pretrained(tmp_path / "dense")
    request = tiny.request("random", scope="global", seed=2, attention_unit=unit, sparsity=0.4, reconstruction="none")
    pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
    pruner.prune(request, tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    expected = tiny.masked_by_hand(dense, pruner.plan)(tokens[:4]).logits
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()

    assert pruner.plan.removed((1, "attention"))
    assert (again(tokens[:4]).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (dense(tokens[:4]).logits - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("unit", ["query_head", "kv_group"])
@pytest.mark.parametrize("name", NAMES)
def test_a_unit_counts_the_weights_of_its_norms(name, unit):
    with_norms = find_sites(tiny.make_model(name), unit, ("attention",))[0]
    changes = {"use_qk_norm": False} if name == "cohere_query_norms" else {"qk_layernorm": False}
    without = find_sites(tiny.make_model(name, **changes), unit, ("attention",))[0]
    # Two query heads share a key head, and all have 8 features. LayerNorms of StableLM have no biases.
    of_unit = 8 if unit == "query_head" else 3 * 8

    assert with_norms.unit_parameters == without.unit_parameters + of_unit
    # The norms of 6 query heads and 3 key heads go with the whole attention, whatever its units are.
    assert with_norms.all_parameters == without.all_parameters + 9 * 8

"""Widths for fast kernels, and for devices that share every layer."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.architectures import find_sites


def widths_of(model, attention_unit="query_head"):
    return {site.key: site.num_units for site in find_sites(model, attention_unit)}


@pytest.mark.parametrize(
    ("dtype", "channels", "fields", "step"),
    [
        (torch.bfloat16, 2048, {}, 64),
        (torch.bfloat16, 2047, {}, 1),
        (torch.float32, 2048, {}, 1),
        (torch.bfloat16, 2048, {"multiple_of": 10}, 10),
        # Every device has fewer than 2048 channels.
        (torch.bfloat16, 2048, {"tensor_parallel": 2}, 2),
        (torch.bfloat16, 4096, {"tensor_parallel": 2}, 128),
        # The second round prunes models of less than 2048 channels.
        (torch.bfloat16, 2048, {"rounds": 2}, 64),
        (torch.bfloat16, 2048, {"scope": "global", "budget": "joint", "kinds": ["attention", "mlp"]}, 64),
    ],
    ids=str,
)
def test_widths_are_multiples_by_default_where_kernels_gain_from_it(dtype, channels, fields, step):
    model = tiny.make_model("llama_gqa_biases", dtype=dtype, intermediate_size=channels, num_key_value_heads=2)
    pruner = FwdPruner(model)
    pruner.prune(tiny.request("magnitude", **{"sparsity": 0.3325, "kinds": ["mlp"], **fields}))
    widths = [width for (_, kind), width in widths_of(pruner.model).items() if kind == "mlp"]

    assert all(width < channels and width % step == 0 for width in widths)
    assert any(width % (64 if step == 1 else 2 * step) for width in widths)


@pytest.mark.parametrize("attention_unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_devices_share_heads_groups_and_channels_of_every_layer(scope, attention_unit):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 100}
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", **shape))
    kinds = {"attention_unit": attention_unit, "kinds": ["attention", "mlp"]}
    pruner.prune(tiny.request("magnitude", scope=scope, sparsity=0.4, tensor_parallel=4, **kinds))

    assert {len(units) % 4 for units in pruner.plan.kept.values()} == {0}
    for layer in pruner.model.model.layers:
        heads, groups = (linear.out_features // 8 for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        assert heads % 4 == groups % 4 == 0
    assert pruner.report.removed_parameters > 0.3 * pruner.report.prunable_parameters


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({}, 4, r"layer 0 has 6 query heads, which 4 does not divide.*divide all sizes of this model: 1\."),
        ({"num_key_value_heads": 2, "intermediate_size": 90}, 6, r"has 2 KV groups, which 6 .*of this model: 1, 2\."),
        ({"num_key_value_heads": 6, "intermediate_size": 91}, 6, r"layer 0 has 91 MLP channels, which 6 does not"),
    ],
)
def test_what_the_dense_model_cannot_share_is_refused(changes, devices, message):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", **changes))
    with pytest.raises(ValueError, match=message):
        pruner.prune(tiny.request("magnitude", sparsity=0.4, tensor_parallel=devices))

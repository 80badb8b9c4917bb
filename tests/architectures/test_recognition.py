"""What is recognised of a family that is not supported, on the families whose layouts are declared."""

import pytest
import tiny
import torch
import transformers

from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.architectures.recognition import recognise_layout
from optimum_fwdprune.models.layout import has_submodule


# Fused rows of grouped heads are not told from other linears.
NOT_RECOGNISED = ("falcon_multi_query", "falcon_grouped")


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name not in NOT_RECOGNISED])
def test_norms_and_scales_of_a_layer_are_recognised_without_weights(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny.make_config(name))
    recognised = recognise_layout(model)
    architecture, config = get_architecture(model.config), model.config
    layout, (_, layer) = architecture.layout, architecture.layers(model)[0]

    assert bool(recognised.options.get("output_norm")) == layout.output_norm
    assert ("residual_multiplier" in recognised.options) == (layout.residual_multiplier(config) != 1)
    assert ("residual_adds_up" in recognised.options) == (not layout.residual_adds_up(config))
    assert ("normalizes_stream" in recognised.options) == layout.normalizes_stream(config)
    for kind, part in (("attention", recognised.attention), ("mlp", recognised.mlp)):
        declared = [name for name in layout.modules_of(kind, config) if name in layout.sublayer(kind).norms]
        # A third party need not declare the norms.
        if name != "persimmon_third_party":
            assert list(part.norms) == [name for name in declared if has_submodule(layer, name)]
    for field in ("query_norms", "key_norms"):
        declared = getattr(layout.attention, field)
        assert getattr(recognised.attention, field) == (
            declared if has_submodule(layer, f"{layout.attention.module}.{declared}") else ""
        )
    assert recognised.attention.fixed == layout.attention.fixed

"""Statistics against plain numpy, whatever the batch size and wherever the padding is."""

import numpy as np
import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, find_sites
from optimum_fwdprune.forward.gathering import collect_statistics
from optimum_fwdprune.forward.statistics import GRAM, MOMENTS, SOURCE_NORMS
from optimum_fwdprune.loading.subject import Subject


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_statistics_are_those_of_numpy(dense, tokens, batch_size):
    sites = find_sites(dense)
    statistics = collect_statistics(Subject(dense, sites), Calibration(tokens), batch_size, (MOMENTS, GRAM))
    for site in sites:
        values, found = tiny.projection_inputs(dense, site, tokens), statistics[site.key]

        assert found.count == len(values) == tokens.numel()
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.variance, values.var(0), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found.norm, np.linalg.norm(values, axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.gram, values.T @ values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 16])
@torch.no_grad()
def test_source_norms_are_those_of_what_goes_into_the_source_linears(dense, tokens, batch_size):
    mask = torch.ones_like(tokens)
    mask[:3, :5] = 0
    seen, handles = {}, []
    sites = find_sites(dense, "kv_group")
    sources = {c.name: c.linear for site in sites for c in site.couplings if c.axis == 0}
    for name, linear in sources.items():
        hook = lambda _module, args, name=name: seen.update({name: args[0].flatten(0, -2)})  # noqa: E731
        handles.append(linear.register_forward_pre_hook(hook))
    dense(tokens, attention_mask=mask)
    for handle in handles:
        handle.remove()
    statistics = collect_statistics(Subject(dense, sites), Calibration(tokens, mask), batch_size, (SOURCE_NORMS,))

    found = {name: norm for site in sites for name, norm in statistics[site.key].source_norms.items()}
    assert found.keys() == sources.keys()
    for name, norm in found.items():
        values = seen[name][mask.bool().flatten()].double().numpy()
        np.testing.assert_allclose(norm, np.linalg.norm(values, axis=0), rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(architecture_name, tokens, side):
    model = tiny.make_model(architecture_name)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(torch.randint(1, 12, (len(tokens),), generator=torch.Generator().manual_seed(0))):
        mask[row, : int(length)] = 0
    mask = mask if side == "left" else mask.flip(1)
    sites = find_sites(model)
    found = collect_statistics(Subject(model, sites), Calibration(tokens, mask), batch_size=16)
    # What stands under the padding makes no difference.
    other = collect_statistics(Subject(model, sites), Calibration(tokens.where(mask.bool(), torch.tensor(7)), mask), 5)
    for site in sites:
        values = tiny.projection_inputs(model, site, tokens, mask)

        assert found[site.key].count == int(mask.sum())
        np.testing.assert_allclose(found[site.key].mean, values.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[site.key].variance, values.var(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(other[site.key].mean, found[site.key].mean, rtol=1e-3, atol=1e-5)


def test_a_small_variance_far_from_zero_does_not_cancel():
    """Squares of values around 1000 summed in float32 would drown a variance of 1e-4."""
    from optimum_fwdprune.forward.accumulators import Accumulator

    generator = torch.Generator().manual_seed(0)
    values = 1000 + 0.01 * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    accumulator = Accumulator(4, torch.device("cpu"))
    for batch in values.float().split(999):
        accumulator.add(batch)

    np.testing.assert_allclose(accumulator.result().variance, values.float().double().var(0, correction=0), rtol=1e-3)


def test_hooks_are_gone_after_an_error(tokens):
    model = tiny.make_model("llama_gqa_biases")
    sites = find_sites(model)
    with pytest.raises(IndexError):
        # Tokens beyond the vocabulary, which only load_calibration checks.
        collect_statistics(Subject(model, sites), Calibration(tokens + 10_000), 4)

    assert not any(site.projection._forward_pre_hooks for site in sites)


def test_a_projection_that_is_bypassed_is_named(tokens, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    layer = model.model.layers[1]
    monkeypatch.setattr(layer.mlp, "forward", lambda hidden: hidden)
    with pytest.raises(ValueError, match=r"called model\.layers\.1\.mlp\.down_proj, so that the mlp of layer 1"):
        collect_statistics(Subject.of(model), Calibration(tokens), 4)


def test_statistics_of_two_texts_add_up_to_those_of_both(tokens):
    model = tiny.make_model("llama_gqa_biases")
    sites = find_sites(model)
    kinds = (MOMENTS, SOURCE_NORMS)
    whole = collect_statistics(Subject(model, sites), Calibration(tokens), 4, kinds)
    first = collect_statistics(Subject(model, sites), Calibration(tokens[:5]), 4, kinds)
    rest = collect_statistics(Subject(model, sites), Calibration(tokens[5:]), 4, kinds)
    for site in sites:
        both, expected = first[site.key].with_more(rest[site.key]), whole[site.key]
        assert both.count == expected.count
        torch.testing.assert_close(both.mean, expected.mean)
        torch.testing.assert_close(both.variance, expected.variance)
        torch.testing.assert_close(both.source_norms, expected.source_norms)

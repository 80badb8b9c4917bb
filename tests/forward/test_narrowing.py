"""Narrow computations against those with all features, and sums of products against plain products."""

import pytest
import tiny
import torch

from optimum_fwdprune import find_sites
from optimum_fwdprune.forward.gates import Projection, kept_projection, kept_sources, replaced_projections
from optimum_fwdprune.forward.narrowing import is_narrow, narrowed
from optimum_fwdprune.forward.products import add_products, mirror
from optimum_fwdprune.runs.devices import back_to


def changed(values):
    return back_to(values.double() + 0.1 * torch.randn(values.shape, dtype=torch.float64), values)


def new_projections(model, kinds, with_sources):
    """Every second unit of every second site, with other weights; the last site loses all units."""
    sites = [site for site in find_sites(model) if site.kind in kinds]
    projections = {}
    for site in sites[::2]:
        per_group = site.num_units // site.num_groups
        kept = [unit for unit in range(site.num_units) if unit % per_group < max(1, per_group // 2)]
        plain = kept_projection(site, kept)
        sources = {name: changed(value) for name, value in kept_sources(site, kept).items()} if with_sources else {}
        projections[site.key] = Projection(kept, changed(plain.weight), plain.bias, sources)
    projections[sites[-1].key] = kept_projection(sites[-1], [])
    return sites, projections


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_narrow_sites_compute_what_whole_sites_do(name):
    torch.manual_seed(0)
    model, tokens = tiny.make_model(name), torch.randint(3, tiny.VOCAB, (2, 9))
    dense = model(input_ids=tokens).logits
    for with_sources in (False, True):
        sites, projections = new_projections(model, tiny.kinds_of(name), with_sources)
        with replaced_projections(sites, projections):
            expected = model(input_ids=tokens).logits
        features = {}
        handles = [
            site.projection.register_forward_pre_hook(
                lambda _module, args, key=site.key, found=features: found.update({key: args[0].shape[-1]})
            )
            for site in sites
        ]
        with narrowed(sites, projections):
            torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
        for handle in handles:
            handle.remove()
        for site in sites:
            narrow = is_narrow(site, projections)
            assert narrow == (site.pointwise and site.key in projections)
            kept = len(projections[site.key].kept) if narrow else site.num_units
            assert features[site.key] == kept * site.unit_width
        assert not torch.equal(expected, dense)
        assert torch.equal(model(input_ids=tokens).logits, dense)


@pytest.mark.parametrize("features", [5, 200, 1000])
def test_products_are_summed_over_batches_and_mirrored(features):
    first, second = torch.randn(2, 30, features, dtype=torch.float64)
    total = torch.zeros(features, features, dtype=torch.float64)
    add_products(total, first)
    add_products(total, second)
    torch.testing.assert_close(mirror(total), first.T @ first + second.T @ second)

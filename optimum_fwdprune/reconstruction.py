"""What the kept input features of an output projection can do about the removed ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .architectures import Site, SiteKey
from .gates import Projection
from .statistics import GRAM, MOMENTS, SiteStatistics


NONE, BIAS, LEAST_SQUARES = "none", "bias", "least_squares"

# What each kind of reconstruction needs measured, on top of what the method needs.
STATISTICS_OF: dict[str, tuple[str, ...]] = {NONE: (), BIAS: (MOMENTS,), LEAST_SQUARES: (GRAM,)}

# Share of the mean diagonal of the Gram matrix that is added to its diagonal before solving.
RIDGE = 1e-2


def added_parameters(sites: Iterable[Site], kind: str) -> int:
    """Return how many parameters a reconstruction adds to the model: biases where projections had none."""
    if kind != BIAS:
        return 0
    return sum(site.projection.out_features for site in sites if site.projection.bias is None)


@torch.no_grad()
def reconstruct(
    sites: Iterable[Site],
    kept: Mapping[SiteKey, list[int]],
    statistics: Mapping[SiteKey, SiteStatistics],
    kind: str,
) -> dict[SiteKey, Projection]:
    """Return new projection parameters for every site that loses units.

    `"bias"` adds the mean output of the removed features, `b + W_r E[x_r]` (FLAP, arXiv 2312.11983, eq. 5).
    `"least_squares"` refits the kept columns to the dense output over the calibration tokens,
    `W_k + W_r H_rk (H_kk + λI)⁻¹` with `H = Σ x xᵀ` and `λ = RIDGE · mean(diag H)`.

    Args:
        sites (iterable of `Site`): the sites of the dense model.
        kept (mapping of site key to `list[int]`): units that stay.
        statistics (mapping of site key to `SiteStatistics`): of the dense model.
        kind (`str`): `"none"`, `"bias"` or `"least_squares"`.
    """
    if kind == NONE:
        return {}
    rebuild = {BIAS: _compensate_bias, LEAST_SQUARES: _least_squares}[kind]
    projections = {}
    for site in sites:
        units = kept[site.key]
        mask = torch.zeros(site.num_units, dtype=torch.bool)
        mask[units] = True
        features = site.feature_mask(mask).to(site.projection.weight.device)
        weight, bias = rebuild(site, features, statistics[site.key])
        dtype = site.projection.weight.dtype
        projections[site.key] = Projection(units, weight.to(dtype), None if bias is None else bias.to(dtype))
    return projections


def _compensate_bias(site: Site, kept: torch.Tensor, statistics: SiteStatistics):
    weight, bias = site.projection.weight, site.projection.bias
    lost = weight[:, ~kept].float() @ statistics.mean[~kept]
    return weight[:, kept], lost if bias is None else bias.float() + lost


def _least_squares(site: Site, kept: torch.Tensor, statistics: SiteStatistics):
    weight, bias = site.projection.weight, site.projection.bias
    if kept.all():
        return weight, bias
    gram = statistics.gram
    within = gram[kept][:, kept].double()
    within.diagonal().add_(RIDGE * float(gram.diagonal().double().mean()) + torch.finfo(torch.float32).tiny)
    across = gram[kept][:, ~kept].double()
    # [kept, removed]: how the kept features predict each removed one.
    prediction = torch.linalg.solve(within, across)
    return weight[:, kept].float() + weight[:, ~kept].float() @ prediction.T.float(), bias

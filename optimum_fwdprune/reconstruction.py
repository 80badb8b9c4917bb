"""What the kept input features of an output projection can do about the removed ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers import PreTrainedModel

from .architectures import Site, SiteKey
from .calibration import Calibration
from .gates import Projection
from .statistics import GRAM, MOMENTS, SiteStatistics, collect_statistics


NONE, BIAS, LEAST_SQUARES = "none", "bias", "least_squares"

# Statistics that scoring gathers along the way where this kind of reconstruction will follow.
STATISTICS_OF: dict[str, tuple[str, ...]] = {NONE: (), BIAS: (MOMENTS,), LEAST_SQUARES: ()}

# Share of the mean diagonal of the Gram matrix that is added to its diagonal before solving.
RIDGE = 1e-2

# Gram matrices held at the same time. What does not fit waits for another pass over the calibration tokens.
GRAM_BYTES = 2 * 2**30


def added_parameters(sites: Iterable[Site], kind: str) -> int:
    """Return how many parameters a reconstruction adds to the model: biases where projections had none."""
    if kind != BIAS:
        return 0
    return sum(site.projection.out_features for site in sites if site.projection.bias is None)


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    sites: Iterable[Site],
    kept: Mapping[SiteKey, list[int]],
    kind: str,
    statistics: Mapping[SiteKey, SiteStatistics],
    calibration: Calibration | None,
    batch_size: int,
) -> dict[SiteKey, Projection]:
    """Return new projection parameters for the sites, measured on the dense model.

    `"bias"` adds the mean output of the removed features, `b + W_r E[x_r]` (FLAP, arXiv 2312.11983, eq. 5).
    `"least_squares"` refits the kept columns to the dense output over the calibration tokens,
    `W_k + W_r H_rk (H_kk + λI)⁻¹` with `H = Σ x xᵀ` and `λ = RIDGE · mean(diag H)`.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed.
        sites (iterable of `Site`): its sites.
        kept (mapping of site key to `list[int]`): units that stay.
        kind (`str`): `"none"`, `"bias"` or `"least_squares"`.
        statistics (mapping of site key to `SiteStatistics`): moments for `"bias"`, which gathers them where empty, and
            Gram matrices for `"least_squares"`, which gathers those that are missing.
        calibration (`Calibration`, *optional*): the tokens. `"least_squares"` passes over them again, once where its
            Gram matrices fit into `GRAM_BYTES`.
        batch_size (`int`): windows per forward pass.
    """
    sites = list(sites)
    losing = [site for site in sites if len(kept[site.key]) < site.num_units]
    if kind == NONE:
        return {}
    if calibration is None:
        raise ValueError(f"reconstruction={kind!r} needs calibration tokens.")
    if kind == BIAS:
        # Scores that were made for another reconstruction may lack the means.
        statistics = statistics or collect_statistics(model, sites, calibration, batch_size, STATISTICS_OF[kind])
        # A checkpoint has projection biases in all layers of a kind or in none.
        kinds = {site.kind for site in losing}
        return {
            site.key: _compensate_bias(site, kept[site.key], statistics[site.key])
            for site in sites
            if site.kind in kinds
        }
    measured = [site for site in losing if site.key in statistics and statistics[site.key].gram is not None]
    projections = {site.key: _least_squares(site, kept[site.key], statistics[site.key]) for site in measured}
    for portion in _portions([site for site in losing if site.key not in projections]):
        grams = collect_statistics(model, portion, calibration, batch_size, (GRAM,))
        for site in portion:
            projections[site.key] = _least_squares(site, kept[site.key], grams.pop(site.key))
    return projections


def _portions(sites: list[Site]) -> Iterator[list[Site]]:
    """Split sites into runs whose Gram matrices fit into `GRAM_BYTES`, one site at least."""
    portion: list[Site] = []
    size = 0
    for site in sites:
        needed = 4 * site.projection.in_features**2
        if portion and size + needed > GRAM_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(site)
        size += needed
    if portion:
        yield portion


def _kept_features(site: Site, kept: list[int]) -> torch.Tensor:
    return site.feature_mask(site.unit_mask(kept)).to(site.projection.weight.device)


def _compensate_bias(site: Site, kept: list[int], statistics: SiteStatistics) -> Projection:
    weight, bias = site.projection.weight, site.projection.bias
    features = _kept_features(site, kept)
    lost = weight[:, ~features].float() @ statistics.mean.to(weight.device)[~features]
    total = lost if bias is None else bias.float() + lost
    return Projection(kept, weight[:, features], total.to(weight.dtype))


def _least_squares(site: Site, kept: list[int], statistics: SiteStatistics) -> Projection:
    weight, bias, gram = site.projection.weight, site.projection.bias, statistics.gram
    assert gram is not None
    features = _kept_features(site, kept)
    within = gram[features][:, features].double()
    # The smallest normal number keeps a site whose inputs are all zero solvable.
    within.diagonal().add_(RIDGE * float(gram.diagonal().double().mean()) + torch.finfo(torch.float32).tiny)
    across = gram[features][:, ~features].double()
    # [kept, removed]: how the kept features predict each removed one.
    prediction = torch.linalg.solve(within, across).to(torch.float32)
    refitted = weight[:, features].float() + weight[:, ~features].float() @ prediction.T
    return Projection(kept, refitted.to(weight.dtype), bias)

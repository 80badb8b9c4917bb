"""Computing with the new parameters of sites at the cost of the pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch.nn import functional as F

from ..architectures import Coupling, Site, SiteKey
from ..architectures.transposed import forward_replaced
from .gates import Projection, replaced_projections


@contextmanager
def narrowed(sites: Iterable[Site], replacements: Mapping[SiteKey, Projection]) -> Iterator[None]:
    """Within the context, use new parameters of sites, and do not compute what their removed units would compute.

    The outputs are those within [`replaced_projections`], which computes the features of all units and the output of
    the old projection too. Features of a site are narrow only where each depends on its own rows alone
    (`Site.pointwise`). The inputs of a projection are then the features of its kept units only.

    Args:
        sites (iterable of `Site`): the sites of the model. Those without weights in memory, and mixtures of experts,
            are computed as within [`replaced_projections`].
        replacements (mapping of site key to `Projection`): the new parameters. Other sites are not changed.
    """
    with ExitStack() as stack:
        for site in sites:
            if site.key not in replacements:
                continue
            if site.routing is not None or not _is_in_memory(site):
                stack.enter_context(replaced_projections([site], replacements))
                continue
            for linear, forward in _forwards(site, replacements[site.key]):
                stack.enter_context(forward_replaced(linear, forward))
        yield


def is_narrow(site: Site, replacements: Mapping[SiteKey, Projection]) -> bool:
    """Return whether the inputs of the projection of a site are the features of its kept units alone within
    [`narrowed`]."""
    return site.pointwise and site.key in replacements and _is_in_memory(site)


def _is_in_memory(site: Site) -> bool:
    return not any(parameter.is_meta for _, parameter in site.owned_parameters())


def _forwards(site: Site, new: Projection) -> Iterator[tuple[torch.nn.Module, Callable]]:
    """Yield the linears of a site that compute something else than before, with their new `forward`."""
    all_kept = len(new.kept) == site.num_units
    for source in site.sources:
        if new.sources or (site.pointwise and not all_kept):
            yield source.linear, _linear(*_source_parameters(site, source, new))
    if site.pointwise or all_kept:
        yield site.projection, _linear(new.weight, new.bias)
    else:
        columns = site.kept_features(new.kept).nonzero().flatten()
        yield site.projection, lambda inputs: F.linear(inputs.index_select(-1, columns), new.weight, new.bias)


def _source_parameters(site: Site, source: Coupling, new: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight and the bias of a source: the kept rows of a pointwise site, else all rows."""
    rows = source.kept_index(site.num_units, new.kept).to(source.linear.weight.device)
    parameters: dict[str, torch.Tensor | None] = {"bias": None}
    for name, value in source.parameters():
        kept = new.sources[f"{source.name}.{name}"] if new.sources else value[rows]
        parameters[name] = kept if site.pointwise else value.index_copy(0, rows, kept)
    return parameters["weight"], parameters["bias"]  # type: ignore[return-value]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda inputs: F.linear(inputs, weight, bias)

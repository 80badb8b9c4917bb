"""The checks of `layout="stock"`: whether a stock checkpoint can hold the model after a request or a plan."""

from __future__ import annotations

from ..allocation.plan import PruningPlan
from ..architectures import Site
from ..architectures.stock_form import find_stock_form
from ..cutting.form import pruned_config, stays_stock
from ..loading.subject import Subject
from ..reconstruction.bias import kinds_gaining_bias
from ..request.choices import WIDTH_KINDS, ReconstructionKind
from ..request.config import PruningConfig


# The layout of requests whose plans can be exported to stock checkpoints.
STOCK = "stock"


def check_stock_layout(subject: Subject, plan: PruningPlan, reconstruction: str = ReconstructionKind.NONE) -> None:
    """Raise `ValueError` where a stock checkpoint could not hold a model that is pruned by a plan.

    Args:
        subject (`Subject`): the dense model with all its sites.
        plan (`PruningPlan`): the plan.
        reconstruction (`str`, defaults to `"none"`): kind of reconstruction, which may add biases.
    """
    if stays_stock(subject, plan.kept):
        return
    with_bias = kinds_gaining_bias(subject.sites, plan.kept, reconstruction)
    config = pruned_config(subject, plan.kept, with_bias)
    find_stock_form(config, subject.architecture.pruned_class(subject.model))


def check_stock_request(subject: Subject, config: PruningConfig) -> None:
    """Raise `ValueError` where a stock checkpoint cannot hold half of the units of a kind that a request prunes."""
    for kind in config.width_kinds:
        plan = _halved(subject, config, kind)
        if (reason := _not_stock(subject, plan, config.reconstruction)) is None:
            continue
        reconstructs = config.reconstruction != ReconstructionKind.NONE
        if reconstructs and _not_stock(subject, plan, ReconstructionKind.NONE) is None:
            raise ValueError(
                f"layout='stock' cannot be combined with reconstruction={config.reconstruction!r} for this model. "
                f"{reason} Set reconstruction='least_squares' or reconstruction='none', which add no parameters."
            )
        others = [other for other in WIDTH_KINDS if other != kind and _allows(subject, config, other)]
        way_out = f"Set kinds={others}, or leave out layout." if others else "Leave out layout."
        raise ValueError(f"layout='stock' does not allow pruning {kind} of this model. {reason} {way_out}")


def _allows(subject: Subject, config: PruningConfig, kind: str) -> bool:
    """Return whether a stock checkpoint can hold half of the units of `kind`."""
    return _not_stock(subject, _halved(subject, config, kind), config.reconstruction) is None


def _halved(subject: Subject, config: PruningConfig, kind: str) -> PruningPlan:
    """Return a plan that keeps half of the units of `kind` in every layer, and all units of other kinds."""
    counts = {site.key: site.num_units for site in subject.sites}
    kept = {site.key: _half(site) if site.kind == kind else list(range(site.num_units)) for site in subject.sites}
    return PruningPlan(kept, counts, subject.model.config.model_type, config.attention_unit)


def _not_stock(subject: Subject, plan: PruningPlan, reconstruction: str) -> str | None:
    """Return why no stock checkpoint can hold the model after a plan, or `None` where one can."""
    try:
        check_stock_layout(subject, plan, reconstruction)
    except ValueError as error:
        return str(error)
    return None


def _half(site: Site) -> list[int]:
    """Return the first half of the units of every group."""
    per_group = site.num_units // site.num_groups
    kept = range(max(1, per_group // 2))
    return [group * per_group + unit for group in range(site.num_groups) for unit in kept]

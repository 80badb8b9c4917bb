"""Checks whether a plan can be carried out on a model."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from ..architectures import get_architecture, layers_left
from ..architectures.depth import values_of_layers
from ..architectures.site import unit_name
from ..loading.subject import Subject
from .plan import PruningPlan


def check_fits(plan: PruningPlan, subject: Subject) -> None:
    """Raise `ValueError` where a plan was made for another model, or where the family cannot express its result.

    Args:
        plan (`PruningPlan`): the plan.
        subject (`Subject`): the model with all its sites.
    """
    plan.check_matches(subject.sites, subject.model.config.model_type)
    for site in subject.sites:
        if site.fixed and 0 < len(plan.kept[site.key]) < site.num_units:
            raise ValueError(
                f"The plan removes some {unit_name(site.kind, plan.attention_unit)} of the {site}, which this "
                f"{plan.model_type} cannot lose: {site.fixed} The plan must keep all {site.num_units} of them or none."
            )
    check_without_layers(subject.model, layers_left(plan.kept))


def check_without_layers(model: PreTrainedModel, left: Iterable[int]) -> None:
    """Raise `ValueError` where a family cannot lose the layers that are not in `left`."""
    left, config = list(left), model.config
    if len(left) == config.get_text_config().num_hidden_layers:
        return
    if get_architecture(config).layout.normalizes_stream(config):
        raise ValueError(
            f"No whole layer of this {config.model_type} can be removed: its layers normalize the residual stream "
            f"itself, so that a layer without attention and MLP still changes it. Remove heads and channels instead, "
            f"or the attention or the MLP of a layer but not both."
        )
    values_of_layers(config, left)

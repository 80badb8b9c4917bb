"""Checks whether a plan can be carried out on a model."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from ..architectures import get_architecture, layers_left
from ..architectures.depth import values_of_layers
from ..architectures.experts import check_experts
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
    check_experts(subject.sites, plan.kept)
    left = layers_left(plan.kept)
    staying = sorted({site.layer for site in subject.sites if site.layer_stays})
    if not set(staying) <= set(left):
        raise ValueError(
            f"The plan removes layer {min(set(staying).difference(left))}, and the first {len(staying)} layers of "
            f"this {plan.model_type} cannot be removed whole: features of images are added to the residual stream "
            f"after each of them. The plan must keep their attention or their MLP."
        )
    check_without_layers(subject.model, left)


def check_without_layers(model: PreTrainedModel, left: Iterable[int]) -> None:
    """Raise `ValueError` where a family cannot lose the layers that are not in `left`."""
    left, config = list(left), model.config.get_text_config()
    if len(left) == config.num_hidden_layers:
        return
    if get_architecture(model.config).layout.normalizes_stream(config):
        raise ValueError(
            f"No whole layer of this {config.model_type} can be removed: its layers normalize the residual stream "
            f"itself, so that a layer without attention and MLP still changes it. Remove heads and channels instead, "
            f"or the attention or the MLP of a layer but not both."
        )
    values_of_layers(config, left)

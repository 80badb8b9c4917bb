"""Blocks of decoder layers, which are trained one after the other, with the layers of the dense model they replace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ...allocation.plan import PruningPlan
from ...architectures.depth import layers_left


@dataclass(frozen=True)
class Block:
    """Consecutive decoder layers of a pruned model that are trained together.

    Args:
        layers (`range`): indices of the layers in the pruned model.
        dense (`range`): indices of the layers of the dense model that they replace. A removed layer counts for the
            layer before it, and the first layers, if they are removed, for the first layer that is kept.
    """

    layers: range
    dense: range

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == last else f"layers {first} to {last}"


def blocks_of(student: PreTrainedModel, teacher: PreTrainedModel, plan: PruningPlan | None, size: int) -> list[Block]:
    """Return the blocks of a pruned model, first to last.

    Args:
        student (`PreTrainedModel`): the pruned model; its weights may be on the meta device.
        teacher (`PreTrainedModel`): the dense model; its weights may be on the meta device.
        plan (`PruningPlan`, *optional*): the plan of the pruning, which lists the layers that were removed.
        size (`int`): layers per block; the last block may have fewer.

    Raises:
        ValueError: where the layers of the dense model are not those that the plan was made for, or hidden states of
            the models have different sizes.
    """
    own, wanted = student.config.get_text_config(), teacher.config.get_text_config()
    left = layers_compared(own, wanted, plan)
    # The layers of the dense model up to the next one that is kept.
    ends = [*left[1:], wanted.num_hidden_layers]
    starts = [0, *ends[:-1]]
    blocks = []
    for first in range(0, len(left), size):
        layers = range(first, min(first + size, len(left)))
        blocks.append(Block(layers, range(starts[first], ends[layers[-1]])))
    return blocks


def layers_compared(own: Any, wanted: Any, plan: PruningPlan | None) -> list[int]:
    """Return the indices in the dense model of the layers that a pruned model has.

    Args:
        own (`PreTrainedConfig`): config of the pruned model's text part.
        wanted (`PreTrainedConfig`): config of the dense model's text part.
        plan (`PruningPlan`, *optional*): the plan of the pruning, which lists the layers that were removed.

    Raises:
        ValueError: where the hidden states of the models cannot be compared layer by layer.
    """
    if own.hidden_size != wanted.hidden_size:
        raise ValueError(
            f"mode='block_distill' compares hidden states, which have {wanted.hidden_size} features in the teacher "
            f"and {own.hidden_size} in the pruned model. Name the model that was pruned as teacher."
        )
    layers, total = own.num_hidden_layers, wanted.num_hidden_layers
    left = list(range(total)) if plan is None else layers_left(plan.kept)
    known = total if plan is None else max(layer for layer, _ in plan.kept) + 1
    if known == total and len(left) == layers:
        return left
    if layers == total:
        # The teacher is a pruned model with the same layers.
        return list(range(total))
    described = "there is no plan that lists removed layers" if plan is None else f"the plan is for {known} layers"
    raise ValueError(
        f"mode='block_distill' compares the models layer by layer. The teacher has {total} layers, the pruned model "
        f"{layers}, and {described}. Name the model that was pruned as teacher."
    )

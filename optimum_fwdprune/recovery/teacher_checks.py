"""Checks whether a pruned model can learn from a teacher."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..architectures import is_supported
from ..architectures.positions import positions_of
from ..loading.state import check_not_consumed
from .options import BLOCK_DISTILL, RecoveryOptions
from .sequences import sequence_length


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, options: RecoveryOptions) -> None:
    """Raise `ValueError` where a student cannot learn from a teacher.

    Args:
        teacher (`PreTrainedModel`): the teacher; its weights may be on the meta device.
        student (`PreTrainedModel`): the model that is trained.
        options (`RecoveryOptions`): `hidden_weight` and `max_length`.
    """
    check_not_consumed(teacher)
    own, wanted = student.config.get_text_config(), teacher.config.get_text_config()
    if not teacher.can_generate() or wanted.is_encoder_decoder:
        raise ValueError(
            f"The teacher is a {type(teacher).__name__}, which predicts no next token; name a causal language model, "
            f"such as one of AutoModelForCausalLM."
        )
    if _share_weights(teacher, student):
        raise ValueError(
            "The teacher shares weights with the model that is trained, so that training would change it too. Load "
            "the dense model again, or name its folder as teacher."
        )
    if wanted.vocab_size != own.vocab_size:
        raise ValueError(
            f"The teacher's vocabulary has {wanted.vocab_size} tokens and the student's {own.vocab_size}; "
            f"distillation compares predictions token by token, so the teacher must use the same tokenizer."
        )
    if options.mode == BLOCK_DISTILL and not is_supported(teacher.config):
        raise ValueError(
            f"mode='block_distill' runs the teacher layer by layer, and {wanted.model_type!r} is no supported family. "
            f"Name the model that was pruned as teacher, or use mode='distill'."
        )
    if options.hidden_weight:
        _check_hidden_states(own, wanted)
    longest = positions_of(wanted)
    length = sequence_length(options, positions_of(own))
    if longest is not None and length > longest:
        raise ValueError(
            f"The teacher has {longest} positions, and training sequences have {length} tokens; set "
            f"max_length={longest}, or name another teacher."
        )


def _check_hidden_states(own: Any, wanted: Any) -> None:
    for name, what in (("num_hidden_layers", "layers"), ("hidden_size", "hidden features")):
        sizes = getattr(wanted, name), getattr(own, name)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"hidden_weight compares hidden states layer by layer, and the teacher has {sizes[0]} {what} and the "
                f"student {sizes[1]}. Leave hidden_weight at 0, or name another teacher."
            )


def _share_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Return whether the models share a weight in memory, so that training would change the teacher too."""
    places = {parameter.data_ptr() for parameter in student.parameters() if not parameter.is_meta}
    own = (parameter for parameter in teacher.parameters() if not parameter.is_meta and parameter.numel())
    return teacher is student or any(parameter.data_ptr() in places for parameter in own)

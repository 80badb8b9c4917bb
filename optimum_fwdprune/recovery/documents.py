"""Packed text whose documents do not attend to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.chats import IGNORED
from ..loading.offloading import input_device
from ..loading.state import evaluating
from ..runs.randomness import seeded_generator


# Tokens of each of the two documents that a model is checked with.
CHECKED = 4


def positions_and_labels(sequences: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of packed tokens in their documents, and labels that leave out the first token of each.

    Transformers lets a token attend to those of its own document alone where positions start again, as its
    `DataCollatorWithFlattening` makes them.

    Args:
        sequences (`ndarray[sequences, tokens]`): the tokens of documents, one document after the other.
        starts (sequence of `int`): the places of the first token of every document.

    Returns:
        two arrays `[sequences, tokens]`.
    """
    count, length = sequences.shape
    places = np.arange(count * length)
    begins = np.zeros(count * length, dtype=bool)
    begins[[start for start in starts if start < count * length]] = True
    # A sequence begins anew too: a document that is cut goes on from position 0.
    begins[::length] = True
    positions = places - np.maximum.accumulate(np.where(begins, places, 0))
    labels = np.where(begins.reshape(count, length), IGNORED, sequences)
    return positions.reshape(count, length), labels


@torch.no_grad()
def check_separates_documents(model: PreTrainedModel, what: str) -> None:
    """Raise `ValueError` where tokens of a model attend to other documents although positions start again.

    Args:
        model (`PreTrainedModel`): the model, in memory.
        what (`str`): what the model is, for the message.
    """
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (1, 2 * CHECKED), generator=seeded_generator(0)).to(input_device(model))
    positions = torch.arange(CHECKED, device=ids.device).repeat(2)[None]
    with evaluating(model):
        alone = model(input_ids=ids[:, CHECKED:], use_cache=False).logits.float()
        joined = model(input_ids=ids, use_cache=False).logits[:, CHECKED:].float()
        try:
            apart = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, CHECKED:].float()
        except (TypeError, ValueError):
            # Families without rotary positions do not take positions.
            apart = joined
    if (apart - alone).abs().max() > 0.1 * (joined - alone).abs().max():
        raise ValueError(
            f"separate_documents=True needs attention that ends where positions start again, and {what}, a "
            f"{type(model).__name__}, has none. Leave it out: documents are then joined by the end-of-text token."
        )

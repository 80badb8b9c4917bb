"""Distillation: the teacher's predictions, made during training or read from disk, and the student's loss on them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..files import check_output_folder, folder_moved_into_place
from ..forward.losses import LOGITS_AT_ONCE
from ..loading.offloading import input_device
from ..runs.progress import progress
from ..words import first_difference
from .data import collate
from .restoring import removed_where_unused
from .sequences import digest_of_sequences


# Columns of a dataset that hold a teacher's likeliest tokens and their log-probabilities.
TEACHER_IDS, TEACHER_LOGARITHMS = "teacher_ids", "teacher_logarithms"

# The probability of all other tokens is 1 minus a sum close to 1. Below this value it is a rounding error, whose
# logarithm would have arbitrarily large gradients.
SMALLEST_REST = 1e-5

# The file beside stored predictions that holds their identity.
IDENTITY_NAME = "teacher.json"


def distillation_terms(
    student: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor,
    teacher_ids: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ cross-entropy with the text, and Σ divergence from the teacher, over some places.

    They are computed for a few places at a time, and a second time for the gradient: in float32, the probabilities of
    all places would take several times the memory of the logits.

    Args:
        student (`Tensor[places, vocab_size]`): logits.
        targets (`Tensor[places]`, int64): tokens of the text.
        teacher, teacher_ids, temperature: see [`divergence_from_teacher`].
    """
    at_once = max(1, LOGITS_AT_ONCE // student.shape[-1])
    ids = [None] * len(targets) if teacher_ids is None else teacher_ids.split(at_once)

    def terms(own, wanted, teaching, known):
        cross_entropy = F.cross_entropy(own.float(), wanted, reduction="sum")
        return torch.stack([cross_entropy, divergence_from_teacher(own, teaching, known, temperature)])

    parts = zip(student.split(at_once), targets.split(at_once), teacher.split(at_once), ids)
    none = student.new_zeros(2, dtype=torch.float32)
    cross_entropy, apart = sum((checkpoint(terms, *part, use_reentrant=False) for part in parts), none)
    return cross_entropy, apart


def divergence_from_teacher(
    student: torch.Tensor, teacher: torch.Tensor, teacher_ids: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Return Σ KL(teacher ‖ student) over the places, times the square of the temperature.

    Where only the teacher's likeliest tokens were stored, all others count as one token, so that the student's
    probability of them is not ignored (Hinton et al., arXiv 1503.02531, over a coarser vocabulary).

    Args:
        student (`Tensor[places, vocab_size]`): logits.
        teacher (`Tensor[places, vocab_size]`): logits; or `[places, k]`, log-probabilities of the likeliest tokens.
        teacher_ids (`Tensor[places, k]`, *optional*): ids of the likeliest tokens.
        temperature (`float`): the logits of both models are divided by it.
    """
    own, wanted = student.float(), teacher.float()
    if teacher_ids is not None:
        # The teacher's probabilities were stored at temperature 1; the rest is flattened by it like any token.
        own, wanted = _with_rest(own.log_softmax(-1).gather(-1, teacher_ids)), _with_rest(wanted)
    own, wanted = (F.log_softmax(logits / temperature, -1) for logits in (own, wanted))
    return temperature**2 * F.kl_div(own, wanted, reduction="sum", log_target=True)


def _with_rest(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of all other tokens together."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(SMALLEST_REST).log()
    return torch.cat([log_probabilities, rest], -1)


class Teacher:
    """A teacher in memory, which predicts the same tokens as the student.

    Args:
        model (`PreTrainedModel`): the dense model; it is put into eval mode.
        hidden_states (`bool`, defaults to `False`): whether to return hidden states too.
    """

    def __init__(self, model: PreTrainedModel, hidden_states: bool = False):
        self.model = model.eval().requires_grad_(False)
        self._hidden_states = hidden_states

    @torch.inference_mode()
    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Return logits `[batch_size, seq_len, vocab_size]`, and hidden states of all layers or `None`."""
        device = input_device(self.model)
        outputs = self.model(
            input_ids=input_ids.to(device),
            attention_mask=None if attention_mask is None else attention_mask.to(device),
            use_cache=False,
            output_hidden_states=self._hidden_states,
            **({} if position_ids is None else {"position_ids": position_ids.to(device)}),
        )
        return outputs.logits.to(input_ids.device), outputs.hidden_states


def hidden_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error of hidden states divided by the teacher's mean square, averaged over layers.

    Args:
        student, teacher (sequences of `Tensor[places, hidden_size]`): hidden states after every layer.
    """
    errors = []
    for own, wanted in zip(student, teacher):
        wanted = wanted.float()
        errors.append((own.float() - wanted).square().mean() / wanted.square().mean())
    return torch.stack(errors).mean()


def identity_of_teacher(data: Dataset, name: str, top_k: int) -> dict[str, Any]:
    """Return the identity of stored predictions as JSON values: the teacher, the sequences, and `top_k`."""
    return {"teacher": name, "top_k": top_k, "tokens": digest_of_sequences(data)}


def check_kept(folder: str | Path | None, identity: Mapping[str, Any]) -> bool:
    """Return whether a folder holds predictions of a teacher; if it does not, check that they can be written to it.

    Args:
        folder (`str` or `Path`, *optional*): folder of stored predictions.
        identity (mapping): the expected identity of the predictions, or a part of it (see [`identity_of_teacher`]).

    Raises:
        ValueError: where the folder holds predictions of another teacher or of other sequences, or something else.
        OSError: where it is a file, or nothing can be written to it.
    """
    if folder is None:
        return False
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file; name a folder to store the teacher's predictions in.")
        with removed_where_unused(folder.parent):
            check_output_folder(folder)
        return False
    try:
        stored = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
        known = {name: stored[name] for name in identity}
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no predictions of a teacher; name a new folder.") from error
    if difference := first_difference(known, dict(identity)):
        raise ValueError(
            f"The predictions in {folder} are for other sequences or from another teacher: {difference}. Name a new "
            f"folder."
        )
    return True


def kept_predictions(folder: str | Path, identity: dict[str, Any]) -> Dataset | None:
    """Return the sequences with a teacher's predictions of them, or `None` where the folder holds none yet.

    Args:
        folder, identity: as for [`check_kept`], which raises the errors.
    """
    return load_from_disk(str(folder)) if check_kept(folder, identity) else None


def keep_predictions(
    data: Dataset, teacher: Teacher, folder: str | Path, identity: dict[str, Any], batch_size: int
) -> Dataset:
    """Let a teacher predict all sequences, store its likeliest tokens in a folder, and return the sequences with them.

    Args:
        data (`Dataset`): sequences with `input_ids` and `labels`, and `attention_mask` where some are padded.
        teacher (`Teacher`): the teacher.
        folder (`str` or `Path`): folder to write; it appears whole or not at all.
        identity (`dict`): identity of the predictions, see [`identity_of_teacher`].
        batch_size (`int`): sequences per forward pass.
    """
    numbers = List(Value("int32"))
    kept = [name for name in ("input_ids", "labels", "attention_mask") if name in data.column_names]
    features = Features(
        {
            **dict.fromkeys(kept, numbers),
            TEACHER_IDS: List(numbers),
            TEACHER_LOGARITHMS: List(List(Value("float32"))),
        }
    )

    def rows() -> Iterator[dict]:
        batches = range(0, len(data), batch_size)
        for start in progress(batches, "Predicting with the teacher", unit="batch"):
            sequences = [data[place] for place in range(start, min(start + batch_size, len(data)))]
            # The likeliest tokens are chosen on the teacher's device, since all logits are large.
            batch = {name: values.to(input_device(teacher.model)) for name, values in collate(sequences).items()}
            logits, _ = teacher(batch["input_ids"], batch.get("attention_mask"))
            values, ids = F.log_softmax(logits.float(), -1).topk(min(identity["top_k"], logits.shape[-1]), -1)
            for row, sequence in enumerate(sequences):
                length = len(sequence["input_ids"])
                known = {
                    TEACHER_IDS: ids[row, :length].cpu().numpy(),
                    TEACHER_LOGARITHMS: values[row, :length].cpu().numpy(),
                }
                yield {name: sequence[name] for name in kept} | known

    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as writing,
        folder_moved_into_place(folder) as temporary,
    ):
        # Without an explicit fingerprint, datasets would pickle the teacher to compute one.
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        written = Dataset.from_generator(rows, features=features, cache_dir=writing, fingerprint=fingerprint)
        written.save_to_disk(str(temporary))
        (temporary / IDENTITY_NAME).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    return load_from_disk(str(folder))

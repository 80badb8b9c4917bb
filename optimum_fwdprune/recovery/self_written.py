"""Training text that the teacher writes itself, so that no data is needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.sampling import Sampling, sample_from_model
from ..data.texts import SELF
from ..loading.state import evaluating
from ..runs.resume import Resume, digest_of
from .amounts import Wanted
from .arguments import RecoveryArguments
from .options import TAUGHT


# Parameters of the teacher that its digest is of. Teachers in memory may have no name, or the same.
LAST = 8


def check_self_written(is_self_written: bool, args: RecoveryArguments) -> None:
    """Raise `ValueError` where a teacher is to write text and there is no teacher, or no amount of text.

    Args:
        is_self_written (`bool`): whether the data includes text that the teacher writes.
        args (`RecoveryArguments`): the mode and the length of the training.
    """
    if not is_self_written:
        return
    if args.mode not in TAUGHT:
        raise ValueError(
            f"dataset={SELF!r} is text that the teacher writes, and mode={args.mode!r} has no teacher. Use "
            f"mode='distill' or 'block_distill', or name other data."
        )
    if args.tokens is None and args.time is None and args.max_steps <= 0:
        raise ValueError(
            f"dataset={SELF!r} is text that the teacher writes, as much as is wanted: set tokens (such as "
            f"tokens='1M'), time or max_steps."
        )


@dataclass(frozen=True, eq=False)
class SelfWritten:
    """Text that a teacher writes at temperature 1, from its BOS token.

    In every second batch, the first token after it is random, which makes the texts more varied (LLM-QAT, arXiv
    2305.17888).

    Args:
        teacher (`PreTrainedModel`): the teacher, in memory.
        name (`str`): the name of the teacher, by which cached text is found again, together with a digest of its last
            weights.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, whose special tokens are not drawn.
        folder (`Path`): the folder in which the text is cached.
        batch_size (`int`): sequences per batch.
        seed (`int`): seed of the text.
    """

    teacher: PreTrainedModel
    name: str
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path
    batch_size: int
    seed: int

    # The name of the data in a record.
    source: ClassVar[str] = SELF

    def read(self, wanted: Wanted, length: int) -> Dataset:
        """Return sequences of this text with `input_ids` and `labels`.

        Args:
            wanted (`Wanted`): how much to write.
            length (`int`): tokens per sequence.

        Raises:
            ValueError: where no amount is wanted, or the teacher cannot generate text.
        """
        count = wanted.of_length(length)
        if count is None:
            raise ValueError(f"The teacher writes as much text for {SELF!r} as is wanted, and no amount is named.")
        sampling = Sampling(count, length, self.batch_size, self.seed, with_first_tokens=True)
        last = [(name, value) for name, value in self.teacher.named_parameters() if not value.is_meta][-LAST:]
        teacher = f"{self.name} {digest_of(last)[:16]}"
        identity = {"teacher": teacher, "sequences": count, "length": length, "seed": self.seed}
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        with evaluating(self.teacher):
            ids = sample_from_model(
                self.teacher, self.tokenizer, sampling, Resume(self.folder / digest, {"text": identity})
            ).to(torch.int32)
        return Dataset.from_dict({"input_ids": ids.numpy(), "labels": ids.numpy()})

"""Training sequences: text packed to full length, or chats and instructions with the loss on their answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.positions import positions_of
from ..data.chats import IGNORED
from ..data.mixtures import Mixture
from ..data.texts import SELF, is_self
from ..words import public_name
from .amounts import Wanted
from .arguments import RecoveryArguments
from .mixtures import read_mixture
from .options import RecoveryOptions
from .self_written import SelfWritten
from .sequences import sequence_length, sequences_of


@dataclass(frozen=True)
class TrainingTexts:
    """The data that a model is trained and evaluated on.

    Args:
        dataset: text, chats, instructions or token ids, see [`training_data`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required unless the data are token ids.
        eval_dataset (*optional*): held-out data for `eval_strategy`, of the same kinds as `dataset`.
    """

    dataset: Any
    tokenizer: PreTrainedTokenizerBase | None = None
    eval_dataset: Any = None

    @property
    def name(self) -> str:
        """The name of the data in a record, without a path of this machine."""
        mixture = Mixture.of(self.dataset)
        if mixture is not None:
            return str(mixture)
        return public_name(str(self.dataset)) if isinstance(self.dataset, (str, Path)) else "data in memory"

    def on_command_line(self) -> list[str] | None:
        """Return the sources of the data as words of the command line, without paths of this machine.

        `None` is returned where some of it is in memory, or there is an `eval_dataset`.
        """
        mixture = Mixture.of(self.dataset)
        sources, weights = ([self.dataset], [1.0]) if mixture is None else (mixture.sources, mixture.weights)
        if self.eval_dataset is not None or not all(isinstance(source, (str, Path)) for source in sources):
            return None
        names = [public_name(str(source)) for source in sources]
        return [name if weight == 1 else f"{name}:{weight:g}" for name, weight in zip(names, weights)]

    @property
    def is_self_written(self) -> bool:
        """Whether the teacher writes some of the text."""
        mixture = Mixture.of(self.dataset)
        sources = [self.dataset] if mixture is None else mixture.sources
        return any(map(is_self, sources))

    def written_by(self, teacher: PreTrainedModel, name: str, args: RecoveryArguments) -> TrainingTexts:
        """Return the same data, with text that a teacher writes in the place of `"self"`.

        Args:
            teacher (`PreTrainedModel`): the teacher, in memory.
            name (`str`): its name.
            args (`RecoveryArguments`): arguments of the training.
        """
        if not self.is_self_written:
            return self
        folder = Path(str(args.output_dir)) / "self_written"
        written = SelfWritten(teacher, name, self.tokenizer, folder, args.train_batch_size, args.seed)
        mixture = Mixture.of(self.dataset)
        return replace(self, dataset=written if mixture is None else mixture.replaced(SELF, written))

    def without_self_written(self) -> tuple[Any, float]:
        """Return the data without text that the teacher writes, and the share of the tokens that it has; `None` where
        the teacher writes all of it."""
        if not self.is_self_written:
            return self.dataset, 1.0
        mixture = Mixture.of(self.dataset)
        return (None, 0.0) if mixture is None else mixture.without(SELF)

    def kept_for_reading_again(self) -> TrainingTexts:
        """Return the same data, with the items of generators in lists, so that it can be read several times."""
        dataset, eval_dataset = (
            list(source) if isinstance(source, Iterator) else source for source in (self.dataset, self.eval_dataset)
        )
        return replace(self, dataset=dataset, eval_dataset=eval_dataset)


def limits_of(model: PreTrainedModel) -> dict[str, int | None]:
    """Return the arguments `longest` and `vocab_size` of [`training_data`] for a model."""
    return {"longest": positions_of(model.config), "vocab_size": model.config.get_text_config().vocab_size}


def training_data(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RecoveryOptions,
    wanted: Wanted | int | None = None,
    longest: int | None = None,
    vocab_size: int | None = None,
) -> Dataset:
    """Return sequences to train on, with columns `input_ids` and `labels`, and `attention_mask` where some are padded.

    The columns determine the kind of the data:

    - Token ids (`input_ids`): rows are not joined, and a row of more than `max_length` tokens is cut into several
      sequences. `labels` are used if there are any, and tokens that `attention_mask` hides do not count in the loss.
    - Chats (`messages` with `role` and `content`, or ShareGPT's `from` and `value`; and `prompt` and `completion`,
      `instruction` (`input`) and `output`, or `question` and `answer`, which are converted to chats): the tokenizer's
      chat template is applied if it has one, and only the answers count in the loss. Where the template writes an
      answer differently once another message follows it, every answer is in a sequence of its own. Tokens after the
      first `max_length` are cut off, and a warning counts those of answers.
    - Text: it is packed end to end into sequences of `max_length` tokens.

    A list of names such as `["wikitext2", "chats.jsonl:0.5"]`, or a [`Mixture`], mixes several sources. The weights
    are shares of the tokens, and there are as many as the source that ends first allows.

    Rows that cannot be used, such as a chat that the template refuses, are left out, and a warning counts them.

    Args:
        source: a file, a dataset of the Hub or in memory, pandas, a list or generator of texts, chats, rows or token
            ids, a mapping of columns such as a tokenizer returns, or a tensor or array of token ids.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required unless the data are token ids.
        options (`RecoveryOptions`): `max_length` and the `dataset_*` fields.
        wanted (`Wanted` or `int`, *optional*): how much to read, or the largest number of sequences; by default all.
        longest (`int`, *optional*): the model's number of positions.
        vocab_size (`int`, *optional*): size of the model's vocabulary.

    Raises:
        ValueError: where the data is empty or too short, a named column is missing (the message lists the columns), no
            row can be used (with the reason), or tokens are beyond the vocabulary.
    """
    mixture = Mixture.of(source)
    limits = {"longest": longest, "vocab_size": vocab_size}
    wanted = wanted if isinstance(wanted, Wanted) else Wanted(wanted)
    if mixture is not None:
        length = sequence_length(options, longest)
        return read_mixture(
            mixture, wanted, length, lambda part, few: training_data(part, tokenizer, options, few, **limits)
        )
    if isinstance(source, SelfWritten):
        return source.read(wanted, sequence_length(options, longest))
    return sequences_of(source, tokenizer, options, wanted, **limits)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack sequences into a batch, padding the shorter ones at their end, with labels that do not count.

    The batch has no mask where nothing is padded, so that attention can use its fastest kernel. A token after padding
    would be predicted from padding, so its label does not count.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        fill = IGNORED if name == "labels" else 0
        batch[name] = torch.stack(
            [
                functional.pad(value, (0, 0) * (value.dim() - 1) + (0, length - len(value)), value=fill)
                for value in values
            ]
        )
        if not batch[name].is_floating_point():
            batch[name] = batch[name].long()
    if "attention_mask" not in batch:
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        batch["attention_mask"] = (torch.arange(length) < lengths).long()
    mask = batch["attention_mask"].bool()
    if mask.all():
        del batch["attention_mask"]
    elif "labels" in batch:
        batch["labels"][:, 1:][~mask[:, :-1]] = IGNORED
    return batch

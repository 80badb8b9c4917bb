"""A pruned model with its tokenizer, record and model card, written to a folder or to the Hub."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..architectures import is_pruned
from ..architectures.wrapping import check_no_adapters, is_peft_model
from ..cutting.layered import files_of
from ..files import check_output_folder, folder_moved_into_place
from ..loading.offloading import is_offloaded
from ..loading.saving import check_savable, generation_config_as_it_is, naming_base, save_offloaded
from ..loading.source import Source
from ..loading.state import check_not_consumed
from ..loading.tokenizers import warn_of_missing_tokenizer
from ..record.record import Record
from ..report.card import write_card
from ..runs import ranks
from ..runs.progress import one_step
from .hub import Upload, check_name, check_upload


# Default size of the largest weight file.
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned model, and everything that is saved with it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the pruned model; of a `PeftModel` only the adapters are saved.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        record (`Record`): how it was pruned and trained.
        source (`Source`): where it came from, and where its current weights were saved.
        processor (`ProcessorMixin`, *optional*): what a multimodal model reads images and text with.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    record: Record
    source: Source
    processor: ProcessorMixin | None = None

    def check(self, folder: str | Path, overwrite: bool = False) -> None:
        """Raise the errors of `save` that can be foreseen, so that they are not raised after hours of work.

        Args:
            folder (`str` or `Path`): folder to save to later.
            overwrite (`bool`, defaults to `False`): as for `save`.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where the folder cannot be written.
            ValueError: where the model contains adapters, or its config, its generation config or the tokenizer
                cannot be saved.
        """
        check_output_folder(folder, overwrite)
        self._check_adapters()
        check_savable(self.model, self.tokenizer)

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        name: str | None = None,
    ) -> Source:
        """Write the checkpoint to a folder that appears whole or not at all, and return the source that names it.

        If there are several processes, all of them must call this; the main one writes, and the others wait for it.

        Args:
            folder (`str` or `Path`): folder to write, new or empty.
            overwrite (`bool`, defaults to `False`): replace a folder that is not empty.
            max_shard_size (`int` or `str`, defaults to `"5GB"`): size of the largest weight file.
            name (`str`, *optional*): name that the model card loads the model by; by default the folder's.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where the folder cannot be written.
            TypeError: where an option has another type.
            ValueError: where the model is not pruned, or its adapters have no saved base.
        """
        for option, value, kinds in (("max_shard_size", max_shard_size, (int, str)), ("name", name, (str, NoneType))):
            if not isinstance(value, kinds):
                raise TypeError(f"{option} cannot be {value!r:.80} ({type(value).__name__}); leave it out.")
        ranks.from_main(lambda: self._write(folder, overwrite, max_shard_size, name))
        return self._saved_as(str(folder))

    def push(self, upload: Upload) -> tuple[CommitInfo, Source]:
        """Upload the files that `save` writes; return the commit, and the source that names the repository.

        If there are several processes, all of them must call this; the main one uploads.

        Args:
            upload (`Upload`): repository and options of the upload.

        Raises:
            OSError: where the Hub refuses or fails.
            ValueError: where the name of the repository is invalid, and where `save` raises it.
        """

        def send() -> dict[str, Any]:
            check_upload(upload.repo_id, upload.token)
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "checkpoint"
                self._write(folder, overwrite=False, name=upload.repo_id, is_pushed=True)
                check_name(upload.repo_id, self.source.base)
                commit = upload.send(folder)
            return {field.name: getattr(commit, field.name) for field in dataclasses.fields(CommitInfo) if field.init}

        return CommitInfo(**ranks.from_main(send)), self._saved_as(upload.repo_id)

    def _write(
        self,
        folder: str | Path,
        overwrite: bool,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        name: str | None = None,
        is_pushed: bool = False,
    ) -> None:
        check_not_consumed(self.model)
        if self.record.plan is None and not is_pruned(self.model.config):
            raise ValueError("There is nothing to save yet; prune the model first.")
        self._check_adapters()
        whole = not is_peft_model(self.model)
        record = self.record.leave_with(self.model) if whole else None
        with folder_moved_into_place(folder, overwrite) as temporary, one_step("Writing the checkpoint"):
            if whole and is_offloaded(self.model):
                save_offloaded(self.model, temporary, files_of(self.model))
            else:
                options: dict[str, Any] = {"max_shard_size": max_shard_size} if whole else {}
                base = nullcontext() if whole else naming_base(self.model, str(self.source.saved_as), is_pushed)
                with base, generation_config_as_it_is(self.model, temporary):
                    self.model.save_pretrained(temporary, **options)
            if self.processor is not None:
                self.processor.save_pretrained(temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
            elif self.source.base is None:
                # This model was loaded by the user. For other models, loading has warned already.
                warn_of_missing_tokenizer(self.model.config._name_or_path)
            if record is not None:
                # The modelling code writes the record too, except that of earlier versions.
                record.save(temporary)
                write_card(temporary, name or Path(folder).name, self.model, record, self.source.base)

    def _check_adapters(self) -> None:
        """Raise `ValueError` where adapters can be saved neither by themselves nor as a part of the model."""
        if not is_peft_model(self.model):
            check_no_adapters(self.model, "a pruned checkpoint cannot hold")
        elif self.source.saved_as is None:
            raise ValueError(
                "Adapters are saved without their base, and the pruned model has not been saved yet. Save it first, "
                "or merge the adapters: pruner.model = pruner.model.merge_and_unload()."
            )

    def _saved_as(self, name: str) -> Source:
        """Return the source of the model after saving; it stays the same where only adapters were saved."""
        whole = isinstance(self.model, PreTrainedModel)
        return dataclasses.replace(self.source, saved_as=name) if whole else self.source

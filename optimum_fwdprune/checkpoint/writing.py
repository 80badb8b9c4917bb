"""The verbs of `FwdPruner` that write a checkpoint, to a folder or to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading.source import Source
from ..record.record import Record
from .hub import Upload
from .pruned_checkpoint import PrunedCheckpoint


class WritesCheckpoints:
    """Saves and pushes what a pruner holds: its model, tokenizer and record."""

    _model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    _record: Record
    _source: Source

    def check_saving(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Raise now what `save_pretrained` would raise after hours of work, as far as that can be known.

        Args:
            folder (`str` or `Path`): where the checkpoint is to go.
            overwrite (`bool`, defaults to `False`): as for `save_pretrained`.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where it cannot be written.
            ValueError: where the model has adapters in it, or its config, its generation config or the tokenizer
                cannot be saved.
        """
        self._checkpoint.check(folder, overwrite)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        name: str | None = None,
    ) -> None:
        """Save the pruned model with its tokenizer, plan, request, scores and a model card; of adapters that were not
        merged, these alone.

        The folder appears whole or not at all: everything is written to a temporary sibling first. With several
        processes all of them call this, the main one writes, and the others wait for it.

        Args:
            folder (`str` or `Path`): where to; it must be new or empty.
            overwrite (`bool`, defaults to `False`): replace a folder that is not empty.
            max_shard_size (`str`, defaults to `"5GB"`): largest weight file; of a model with offloaded layers
                every decoder layer has its own.
            name (`str`, *optional*): repository that the model card names; by default the folder.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where it cannot be written.
            ValueError: before `prune`.
        """
        self._source = self._checkpoint.save(folder, overwrite, max_shard_size, name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a pruned model",
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository of the Hub, creating it where it is missing.

        With several processes all of them call this, and the main one does it.

        Args:
            repo_id (`str`): repository id.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str`, *optional*): access token; by default the one that is logged in.
            revision (`str`, *optional*): branch, created where it is missing.
            create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
            commit_message (`str`): of the commit.

        Raises:
            OSError: where the Hub refuses or fails; the pruned model stays as it is, so that it can be tried again.
            ValueError: where `repo_id` is no name of a repository.
        """
        upload = Upload(repo_id, private, token, revision, create_pr, commit_message)
        commit, self._source = self._checkpoint.push(upload)
        return commit

    @property
    def _checkpoint(self) -> PrunedCheckpoint:
        return PrunedCheckpoint(self._model, self.tokenizer, self._record, self._source)

"""The methods of `FwdPruner` that write a checkpoint to a folder or to the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..loading.source import Source
from ..record.record import Record
from .hub import Upload
from .pruned_checkpoint import PrunedCheckpoint


class WritesCheckpoints:
    """A base class of `FwdPruner`, which saves and uploads its model, tokenizer and record."""

    _model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    processor: ProcessorMixin | None
    _record: Record
    _source: Source

    def check_saving(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Raise the errors of `save_pretrained` that can be foreseen, so that they are not raised after hours of work.

        Args:
            folder (`str` or `Path`): folder to save to later.
            overwrite (`bool`, defaults to `False`): as for `save_pretrained`.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where the folder cannot be written.
            ValueError: where the model contains adapters, or its config, its generation config or the tokenizer
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
        """Save the pruned model with its tokenizer or processor, plan, request, scores and a model card.

        Of a model with adapters that were not merged, only the adapters are saved. The folder appears whole or not at
        all, since everything is written to a temporary folder beside it first. If there are several processes, all of
        them must call this; the main one writes, and the others wait for it.

        Args:
            folder (`str` or `Path`): folder to write, new or empty.
            overwrite (`bool`, defaults to `False`): replace a folder that is not empty.
            max_shard_size (`str`, defaults to `"5GB"`): size of the largest weight file; a model with offloaded layers
                has a file per decoder layer instead.
            name (`str`, *optional*): name that the model card loads the model by; by default the folder's.

        Raises:
            FileExistsError: where the folder is not empty.
            OSError: where the folder cannot be written.
            ValueError: where the model was not pruned yet.
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
        """Upload the files that `save_pretrained` writes to a repository of the Hub, creating it where it is missing.

        If there are several processes, all of them must call this; the main one uploads.

        Args:
            repo_id (`str`): repository id.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str`, *optional*): access token; by default that of the user who is logged in.
            revision (`str`, *optional*): branch, created where it is missing.
            create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
            commit_message (`str`): message of the commit.

        Raises:
            OSError: where the Hub refuses or fails; the model is not changed, so that the upload can be tried again.
            ValueError: where `repo_id` is no valid name of a repository.
        """
        upload = Upload(repo_id, private, token, revision, create_pr, commit_message)
        commit, self._source = self._checkpoint.push(upload)
        return commit

    @property
    def _checkpoint(self) -> PrunedCheckpoint:
        return PrunedCheckpoint(self._model, self.tokenizer, self._record, self._source, self.processor)

"""The upload of a pruned checkpoint to the Hub, and a check of the name that the base's licence requires."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..loading.base import Base
from ..runs.loggers import get_logger


logger = get_logger(__name__)


def check_upload(repo_id: str, token: str | None = None) -> None:
    """Raise an error where an upload is known to fail without asking the Hub.

    Raises:
        OSError: where there is no token, or `HF_HUB_OFFLINE` is set.
        ValueError: where `repo_id` is no valid name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no valid name of a repository: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{repo_id} cannot be uploaded: HF_HUB_OFFLINE is set. Unset it, or save to a folder.")
    if not (token or get_token()):
        raise OSError(f"{repo_id} was not uploaded: no access token. Log in with `hf auth login`, or pass one.")


@dataclass(frozen=True)
class Upload:
    """The destination of an upload to the Hub.

    Args:
        repo_id (`str`): repository id.
        private (`bool`, *optional*): visibility of a new repository.
        token (`str`, *optional*): access token; by default that of the user who is logged in.
        revision (`str`, *optional*): branch, created where it is missing.
        create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
        commit_message (`str`, defaults to `"Upload a pruned model"`): message of the commit.
    """

    repo_id: str
    private: bool | None = None
    token: str | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str = "Upload a pruned model"

    def send(self, folder: Path) -> CommitInfo:
        """Upload a checkpoint, creating the repository and the branch where they are missing.

        Raises:
            OSError: where the Hub refuses or fails; the folder is not changed, so that the upload can be tried again.
        """
        api = HfApi(token=self.token, library_name="optimum-fwdprune")
        repo_id = self.repo_id
        try:
            created = api.create_repo(repo_id, private=self.private, exist_ok=True)
            if created.repo_type != "model":
                raise ValueError(f"a {created.repo_type} has this name; choose another one")
            repo_id = created.repo_id
            if self.revision is not None and not self.revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=self.revision, exist_ok=True)
            return api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                revision=self.revision,
                create_pr=self.create_pr,
                commit_message=self.commit_message,
            )
        except Exception as error:  # The network raises errors of many types; the way out is the same for all.
            why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
            raise OSError(
                f"{repo_id} was not uploaded: {why.rstrip('.')}. The local model is not changed; try again once the "
                f"cause is fixed."
            ) from error


def check_name(repo_id: str, base: Base | None) -> None:
    """Warn where the base's licence requires another name."""
    if base is None:
        return
    wanted = base.wanted_name
    if wanted and not repo_id.rpartition("/")[2].startswith(wanted):
        logger.warning(
            'The licence of %s (%s) requires that the name of a model made from it begins with "%s" and that "Built '
            'with %s" is displayed. The name %s does not begin with it.',
            base.name,
            base.license["license"],
            wanted,
            wanted,
            repo_id,
        )

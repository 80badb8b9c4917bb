"""The Hub: what a pruned checkpoint carries over from its base, and its upload."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

from ..runs.loggers import get_logger


logger = get_logger(__name__)

CARD_NAME = "README.md"

# Of the base, which its licence may ask to be passed on.
LEGAL_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")

# Licences that ask for the name of what is made from the model to begin so, and to say what it was built with.
LICENSES_THAT_NAME = {
    "llama3": "Llama",
    "llama3.1": "Llama",
    "llama3.2": "Llama",
    "llama3.3": "Llama",
    "llama4": "Llama",
}


@dataclass(frozen=True)
class Base:
    """The model that was pruned, as far as its repository or folder tells.

    Args:
        name (`str`): repository, or last part of the folder.
        is_repository (`bool`): whether the Hub knows it by that name.
        license (`dict[str, str]`): `license`, `license_name` and `license_link` of its card.
        legal_files (`dict[str, bytes]`): its licence, notice and the like by their names, read before the work: the
            folder may be gone when the pruned model is saved.
    """

    name: str
    is_repository: bool = False
    license: dict[str, str] = field(default_factory=dict)
    legal_files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, model_id: str | Path, **hub_kwargs) -> Base:
        """Read a folder, or a repository of the Hub (or its cached copy); what is not there is left out."""
        path = Path(model_id)

        def find(name: str) -> str | None:
            try:
                return cached_file(str(model_id), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            except OSError as error:
                logger.info("%s of %s cannot be read: %s", name, model_id, error)
                return None

        card = find(CARD_NAME)
        try:
            values = {} if card is None else ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except (OSError, ValueError) as error:
            logger.warning("The card of %s cannot be read, so no licence is carried over: %s", model_id, error)
            values = {}
        names = ("license", "license_name", "license_link")
        return cls(
            name=path.name if path.exists() else str(model_id),
            is_repository=not path.exists(),
            license={name: str(values[name]) for name in names if values.get(name)},
            legal_files={name: Path(file).read_bytes() for name in LEGAL_NAMES if (file := find(name))},
        )


def check_upload(repo_id: str, token: str | None = None) -> None:
    """Raise where an upload would fail whatever the Hub answers: a name that is none, no token, the offline mode.

    Raises:
        OSError: where there is no token, or `HF_HUB_OFFLINE` is set.
        ValueError: where `repo_id` is no name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{repo_id} cannot be uploaded: HF_HUB_OFFLINE is set. Unset it, or save to a folder.")
    if not (token or get_token()):
        raise OSError(f"{repo_id} was not uploaded: no access token. Log in with `hf auth login`, or pass one.")


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a pruned model",
) -> CommitInfo:
    """Upload a checkpoint, creating the repository and the branch where they are missing.

    Raises:
        OSError: where the Hub refuses or fails, saying how to try again; the folder stays as it is.
    """
    api = HfApi(token=token, library_name="optimum-fwdprune")
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        if created.repo_type != "model":
            raise ValueError(f"the name is that of a {created.repo_type}; choose another")
        repo_id = created.repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    except Exception as error:  # Whatever the network does, the way on is the same.
        why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise OSError(
            f"{repo_id} was not uploaded: {why.rstrip('.')}. Nothing local is lost; try again once this is mended."
        ) from error


def check_name(repo_id: str, base: Base | None) -> None:
    """Warn where the base's licence asks for another name."""
    if base is None:
        return
    wanted = LICENSES_THAT_NAME.get(base.license.get("license", ""))
    if wanted and not repo_id.rpartition("/")[2].startswith(wanted):
        logger.warning(
            'The licence of %s (%s) asks that what is made from it has a name that begins with "%s" and says "Built '
            'with %s"; %s does not.',
            base.name,
            base.license["license"],
            wanted,
            wanted,
            repo_id,
        )

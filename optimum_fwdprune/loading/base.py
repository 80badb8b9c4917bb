"""The base of a pruned model: its name, its licence and the files that are passed on with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
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

    @property
    def wanted_name(self) -> str | None:
        """How its licence asks names of derived models to begin; `None` where it does not ask."""
        return LICENSES_THAT_NAME.get(self.license.get("license", ""))

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

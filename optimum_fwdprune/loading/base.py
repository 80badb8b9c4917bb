"""The base of a pruned model: its name, its licence and the files that are passed on with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import cached_file

from ..runs.loggers import get_logger


logger = get_logger(__name__)

CARD_NAME = "README.md"

# Files of the base that its licence may require to be passed on.
LEGAL_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


# Licences that require the name of a derived model to begin with this word, and to display "Built with" it.
LICENSES_THAT_NAME = {
    "llama3": "Llama",
    "llama3.1": "Llama",
    "llama3.2": "Llama",
    "llama3.3": "Llama",
    "llama4": "Llama",
}


@dataclass(frozen=True)
class Base:
    """The model that was pruned, as described by its repository or folder.

    Args:
        name (`str`): repository, or last part of the folder's path.
        is_repository (`bool`): whether the name is that of a repository on the Hub.
        license (`dict[str, str]`): `license`, `license_name` and `license_link` of its card.
        languages (`tuple[str]`): the languages of its card.
        legal_files (`dict[str, bytes]`): content of its licence, notice and the like, by file name. It is read when
            the model is loaded, since the folder may no longer exist when the pruned model is saved.
    """

    name: str
    is_repository: bool = False
    license: dict[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    legal_files: dict[str, bytes] = field(default_factory=dict)

    @property
    def wanted_name(self) -> str | None:
        """The word that names of derived models must begin with by its licence; `None` where there is none."""
        return LICENSES_THAT_NAME.get(self.license.get("license", ""))

    @classmethod
    def of(cls, model_id: str | Path, **hub_kwargs) -> Base:
        """Read a folder, or a repository of the Hub or its cached copy; missing files are left out."""
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
        languages = values.get("language") or ()
        return cls(
            name=path.name if path.exists() else str(model_id),
            is_repository=not path.exists(),
            license={name: str(values[name]) for name in names if values.get(name)},
            languages=(languages,) if isinstance(languages, str) else tuple(map(str, languages)),
            legal_files={name: Path(file).read_bytes() for name in LEGAL_NAMES if (file := find(name))},
        )

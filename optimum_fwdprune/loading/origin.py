"""The origin of a pruned model: where the model that was pruned is stored, and how its weights are recognized.

A checkpoint may be shared, so that its plan holds the name of the model and a fingerprint of its weights, but no path.
Paths are stored in the Hugging Face cache of this machine, in a small file per fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedConfig

from ..files import write_text_atomically
from ..runs import ranks
from ..runs.locks import taking_turns
from ..runs.loggers import get_logger
from ..words import public_name
from .integrity import weight_files


logger = get_logger(__name__)

# The folder of these files inside the cache.
REMEMBERED = "fwdprune/sources"

# Bytes that are read at the beginning, in the middle and at the end of a tensor.
SAMPLE = 512

# Keys of a plan's metadata.
NAME, FINGERPRINT, REVISION = "source", "source_fingerprint", "source_revision"


@dataclass(frozen=True)
class Origin:
    """The model that was pruned.

    Args:
        name (`str`): repository of the Hub, or the last part of a folder's path.
        fingerprint (`str`, *optional*): fingerprint of its weights (see [`fingerprint_of`]); `None` where they are not
            in safetensors files.
        revision (`str`, *optional*): commit of the repository; `None` for a folder.
        folders (`tuple[Path]`): folders that it was read from, or may be in.
    """

    name: str
    fingerprint: str | None = None
    revision: str | None = None
    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: PreTrainedConfig, where: Mapping[str, Any]) -> Origin:
        """Return the origin of models that are pruned from a loaded model.

        Args:
            config (`PreTrainedConfig`): config of the loaded model.
            where (mapping): `token`, `cache_dir` and the like, for a repository.
        """
        name = config._name_or_path
        if not name:
            return cls("")
        folder, revision = Path(name), getattr(config, "_commit_hash", None)
        is_folder = folder.is_dir()
        # The files of the loaded model are in the cache; nothing is downloaded.
        place = {} if is_folder else {**where, "revision": revision, "local_files_only": True}
        try:
            fingerprint = fingerprint_of(name, place)
        except (OSError, ValueError) as error:
            logger.info("%s has no fingerprint: %s", name, error)
            fingerprint = None
        folders = (folder.absolute(),) if is_folder else ()
        return cls(public_name(name), fingerprint, None if is_folder else revision, folders)

    @classmethod
    def of_plan(cls, metadata: Mapping[str, Any], folders: Iterable[Path] = ()) -> Origin | None:
        """Return the origin in a plan's metadata; `None` where there is none.

        Args:
            metadata (mapping): metadata of the plan.
            folders (iterable of `Path`): folders that it may be in, to which those stored on this machine are added.
        """
        name = metadata.get(NAME)
        if not name or not isinstance(name, str):
            return None
        fingerprint = metadata.get(FINGERPRINT)
        return cls(name, fingerprint, metadata.get(REVISION), (*folders, *_remembered(fingerprint)))

    def to_metadata(self) -> dict[str, Any]:
        """Return the metadata for a plan, which hold no path of this machine."""
        values = {NAME: self.name, FINGERPRINT: self.fingerprint, REVISION: self.revision}
        return {name: value for name, value in values.items() if value is not None}

    def remember(self) -> None:
        """Store the folders of this fingerprint on this machine."""
        if self.fingerprint is None or not self.folders or not ranks.is_main():
            return
        memory = _memory_of(self.fingerprint)
        try:
            # The lock prevents that one of two processes overwrites the other's folder.
            with taking_turns(memory):
                known = dict.fromkeys((*self.folders, *_remembered(self.fingerprint)))
                write_text_atomically(memory, json.dumps([str(folder) for folder in known]) + "\n")
        except OSError as error:
            logger.info("The folder of %s cannot be stored: %s", self.name, error)

    def find(self) -> str:
        """Return the folder of the model, or its repository, whose commit is `self.revision`.

        Raises:
            ValueError: where the model cannot be found, or a folder of its name has other weights.
        """
        others = []
        for folder in dict.fromkeys((*self.folders, Path(self.name))):
            if not folder.is_dir():
                continue
            if self.fingerprint is not None and _matches(folder, self.fingerprint):
                return str(folder)
            others.append(folder)
        hidden = next((folder for folder in others if folder == Path(self.name)), None)
        if hidden is None and ("/" in self.name or self.revision is not None):
            return self.name
        if self.fingerprint is None:
            reason = "the checkpoint has no fingerprint of its weights, by which its folder could be recognized"
        elif others:
            reason = f"{', '.join(map(str, others))} holds other weights"
        else:
            reason = "its folder no longer exists, or it was pruned on another machine"
        raise ValueError(
            f"The teacher is the model that was pruned, {self.name}, and {reason}. Name the dense model: "
            f"teacher='FOLDER' (--teacher FOLDER)."
        )


def fingerprint_of(model_id: str | Path, where: Mapping[str, Any]) -> str | None:
    """Return a fingerprint of the weights in the safetensors files of a checkpoint, or `None` where it has none.

    It is computed from the names, dtypes and shapes of all tensors and a sample of their bytes, and does not depend on
    the division into files. At most a few megabytes are read.

    Args:
        model_id (`str` or `Path`): folder or repository.
        where (mapping): `revision`, `token`, `cache_dir` and the like.

    Raises:
        OSError: where a file cannot be read.
        ValueError: where a file is not a safetensors file.
    """
    entries = {}
    for path in weight_files(model_id, where):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                for place in (start, (start + end) // 2, max(start, end - SAMPLE)):
                    file.seek(8 + length + place)
                    digest.update(file.read(min(SAMPLE, end - place)))
                entries[name] = digest.hexdigest()
    if not entries:
        return None
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:32]


def _matches(folder: Path, fingerprint: str) -> bool:
    try:
        return fingerprint_of(folder, {}) == fingerprint
    except (OSError, ValueError) as error:
        logger.info("%s is not the model that was pruned: %s", folder, error)
        return False


def _memory_of(fingerprint: str) -> Path:
    return Path(constants.HF_HOME) / REMEMBERED / f"{fingerprint}.json"


def _remembered(fingerprint: Any) -> list[Path]:
    """Return the stored folders of a fingerprint, the latest one first."""
    # The fingerprint becomes the name of a file, and a plan from elsewhere may hold any string.
    if not isinstance(fingerprint, str) or not fingerprint.isalnum():
        return []
    try:
        folders = json.loads(_memory_of(fingerprint).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logger.info("The stored folders of %s cannot be read: %s", fingerprint, error)
        return []
    return [Path(folder) for folder in folders if isinstance(folder, str)] if isinstance(folders, list) else []

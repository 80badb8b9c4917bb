"""Where a model came from, how it was opened, and where it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .base import Base
from .models import ACCESS, WHERE
from .origin import NAME, Origin


@dataclass(frozen=True)
class Source:
    """Where a model came from, how it was opened, and where it was saved.

    Args:
        arguments (mapping, *optional*): of `from_pretrained`; `None` for a model that was passed in memory.
        access (mapping): those of them that open other repositories of the same user, such as a teacher's.
        base (`Base`, *optional*): name and licence of the model that was pruned.
        folders (`tuple[Path]`): where the model that was pruned may be.
        saved_as (`str`, *optional*): folder or repository of the pruned model as it is now, which adapters can name as
            their base.
        low_memory (`bool`): whether its decoder layers stay on disk.
        work_folder (`str` or `Path`, *optional*): where temporary files lie then; by default where the system keeps
            such files.
    """

    arguments: Mapping[str, Any] | None = None
    access: Mapping[str, Any] = field(default_factory=dict)
    base: Base | None = None
    folders: tuple[Path, ...] = ()
    saved_as: str | None = None
    low_memory: bool = False
    work_folder: str | Path | None = None

    @classmethod
    def opened(cls, model_id: str | Path, arguments: Mapping[str, Any], low_memory: bool) -> Source:
        """Return the source of a model that `from_pretrained` opened with these arguments."""
        access = {name: arguments[name] for name in ACCESS if name in arguments}
        source = cls(arguments, access, low_memory=low_memory, work_folder=arguments.get("offload_folder"))
        return replace(source, base=Base.of(model_id, **source.where))

    @property
    def where(self) -> dict[str, Any]:
        """The arguments that name where the files of its repository are."""
        arguments = self.arguments or {}
        return {name: arguments[name] for name in WHERE if name in arguments}

    def origin_of(self, model: PreTrainedModel) -> Origin:
        """Return the origin of what is pruned from `model`, which this is the source of."""
        return Origin.of(model.config, {name: value for name, value in self.access.items() if name in WHERE})

    def of_checkpoint(self, model_id: str | Path, metadata: Mapping[str, Any]) -> Source:
        """Return it for a pruned checkpoint, which tells where it was pruned from.

        Args:
            model_id (`str` or `Path`): folder or repository of the checkpoint.
            metadata (mapping): of its plan; empty where it has none.
        """
        name = str(metadata.get(NAME) or "")
        folder = Path(name).name
        # Checkpoints often lie beside the model that they were pruned from.
        beside = (Path(model_id).absolute().parent / folder,) if folder and Path(model_id).is_dir() else ()
        # Its card carries the licence of what was pruned.
        base = replace(self.base or Base(name), name=name, is_repository="/" in name) if name else self.base
        return replace(self, base=base, folders=beside, saved_as=str(model_id))

    def of_another_model(self, metadata: Mapping[str, Any]) -> Source:
        """Return it for a model that was made elsewhere.

        Args:
            metadata (mapping): of the plan that the model was pruned by; empty where it is not known.
        """
        name = str(metadata.get(NAME) or "")
        base = Base(name, is_repository="/" in name) if name else None
        return replace(self, arguments=None, base=base, folders=(), saved_as=None)

    def not_saved(self) -> Source:
        """Return it for a model that was changed since it was saved."""
        return replace(self, saved_as=None)

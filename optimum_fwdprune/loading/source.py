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
        arguments (mapping, *optional*): arguments of `from_pretrained`; `None` for a model that was passed in memory.
        access (mapping): those arguments that apply to other repositories of the same user too, such as a teacher's.
        base (`Base`, *optional*): name and licence of the model that was pruned.
        folders (`tuple[Path]`): folders that the model that was pruned may be in.
        saved_as (`str`, *optional*): folder or repository where the pruned model was saved in its current state;
            adapters can name it as their base.
        low_memory (`bool`): whether its decoder layers stay on disk.
        work_folder (`str` or `Path`, *optional*): folder for temporary files of such a model; by default the system's.
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
        """The arguments that determine where the files of its repository are read from."""
        arguments = self.arguments or {}
        return {name: arguments[name] for name in WHERE if name in arguments}

    def origin_of(self, model: PreTrainedModel) -> Origin:
        """Return the origin of models that are pruned from `model`, whose source this is."""
        return Origin.of(model.config, {name: value for name, value in self.access.items() if name in WHERE})

    def of_checkpoint(self, model_id: str | Path, metadata: Mapping[str, Any]) -> Source:
        """Return the source of a pruned checkpoint, completed with the origin in its plan.

        Args:
            model_id (`str` or `Path`): folder or repository of the checkpoint.
            metadata (mapping): metadata of its plan; empty where it has none.
        """
        name = str(metadata.get(NAME) or "")
        folder = Path(name).name
        # A checkpoint is often in the same folder as the model that it was pruned from.
        beside = (Path(model_id).absolute().parent / folder,) if folder and Path(model_id).is_dir() else ()
        # The card of the checkpoint has the licence of the model that was pruned.
        base = replace(self.base or Base(name), name=name, is_repository="/" in name) if name else self.base
        return replace(self, base=base, folders=beside, saved_as=str(model_id))

    def of_another_model(self, metadata: Mapping[str, Any]) -> Source:
        """Return the source of a model that the user made and assigned.

        Args:
            metadata (mapping): metadata of the plan that the model was pruned by; empty where it is not known.
        """
        name = str(metadata.get(NAME) or "")
        base = Base(name, is_repository="/" in name) if name else None
        return replace(self, arguments=None, base=base, folders=(), saved_as=None)

    def not_saved(self) -> Source:
        """Return the source of the model after it was changed, without the place where it was saved."""
        return replace(self, saved_as=None)

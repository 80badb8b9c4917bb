"""Folders for files that a model is read from as long as it exists."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


class Workspace:
    """A folder for the files of a model that is read from disk.

    Args:
        parent (`str` or `Path`, *optional*): the folder in which a temporary folder is created, which is removed with
            this object; by default the system's folder for temporary files.
        kept (`Path`, *optional*): a folder to use instead, which is not removed.
    """

    def __init__(self, parent: str | Path | None = None, kept: Path | None = None):
        if kept is not None:
            self.folder = kept
            return
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix=".fwdprune-", dir=parent)
        self.folder = Path(self._temporary.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        # Copies of a model read the same files.
        return self

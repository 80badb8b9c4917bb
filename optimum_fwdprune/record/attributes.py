"""Attributes whose values are in the record of an object."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar


T = TypeVar("T")


class Recorded(Generic[T]):
    """An attribute that reads and writes the field of the same name in the object's record, `_record`."""

    def __set_name__(self, owner: type, name: str):
        self._name = name

    def __get__(self, holder: Any, owner: type | None = None) -> T:
        # The class itself, which documentation tools read, has no value.
        return self if holder is None else getattr(holder._record, self._name)  # type: ignore[return-value]

    def __set__(self, holder: Any, value: T) -> None:
        changed: dict[str, Any] = {self._name: value}
        holder._record = dataclasses.replace(holder._record, **changed)

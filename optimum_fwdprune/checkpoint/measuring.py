"""Measurements of checkpoints that were saved before, written to their records and cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..evaluation import Comparison
from ..files import check_output_file
from ..loading.base import CARD_NAME
from ..record.record import Record
from ..report.measurements import write_measurements


def check_cards(folders: list[str]) -> None:
    """Raise an error where measurements could not be written to a checkpoint, before anything is measured.

    Args:
        folders (`list[str]`): the checkpoints.

    Raises:
        OSError: where a folder cannot be written.
        ValueError: where it is no folder with a pruned checkpoint and its card.
    """
    for folder in map(Path, folders):
        if not (folder / CARD_NAME).is_file() or Record.of_checkpoint(folder).plan is None:
            raise ValueError(
                f"{folder} is no folder with a pruned checkpoint and its model card, which the figures could be "
                f"written to. Leave the cards out, or save the checkpoint with this package first."
            )
        check_output_file(folder / CARD_NAME)


def save_measurements(folder: str | Path, comparison: Comparison) -> None:
    """Write a comparison to the record and the model card of a checkpoint; what else is on the card stays.

    Args:
        folder (`str` or `Path`): the checkpoint, which [`check_cards`] has checked.
        comparison (`Comparison`): measurements, in which the model of the checkpoint is the last one.
    """
    folder, comparison = Path(folder), comparison.without_folders()
    replace(Record.of_checkpoint(folder), comparison=comparison).save_figures(folder)
    write_measurements(folder / CARD_NAME, comparison)
